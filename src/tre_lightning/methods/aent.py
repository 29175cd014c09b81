"""AEnt: a clamped entropy bonus whose coefficient keeps that entropy within bounds."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.entropy import Region
from tre_lightning.methods.hooks import LossTerm, Tokens
from tre_lightning.ops import PolicyOutputs


class AEnt(LossTerm):
    """Clamped entropy with an adaptive coefficient.

    Source: "On Entropy Control in LLM-RL Algorithms", Shen 2025, arXiv 2509.03493, with the
    author's code (antgroup/AEnt for verl, recipe/AEnt of AReaL). Clamped entropy: the
    floor(clamp_p * |V|) least probable tokens are left out, the rest is renormalised, H is the
    entropy of that. The loss is -coef * mean H. The coefficient starts at ``coef`` and then follows
    the mean H of each rollout:

        coef <- coef - step * (min(0, H - low) + max(0, H - high)), held in [coef_min, coef_max]

    Defaults: ``clamp_p`` 0.3 is that of the verl code; the others are those of the AReaL code. The
    author tunes them for each run and finds ``low`` and ``high`` to matter most:

    =================  ======  =======  ===========  ======  ====================  ======
    example            coef    clamp_p  low, high    step    coef_min, coef_max    warmup
    =================  ======  =======  ===========  ======  ====================  ======
    verl, OpenR1-Math  0.0003  0.25     0.35, 0.62   0.0001  0.00004, 0.001        156
    AReaL's README     0.0002  0.4      0.05, 0.23   0.001   0.00001, 0.003        29
    =================  ======  =======  ===========  ======  ====================  ======

    What the paper itself takes could not be recovered.

    Deviations: H is exact over the rollout under the policy that sampled, and moves the coefficient
    of the updates on that very rollout, the first included; the author averages H over the updates
    of an iteration, and the coefficient moves after them. Equal probabilities at the edge go to the
    lower token id. The verl code's optional pull towards the first coefficient (0 there) is left
    out.
    """

    def __init__(
        self,
        coef: float = 0.001,
        clamp_p: float = 0.3,
        low: float = 0.1,
        high: float = 0.5,
        step: float = 0.001,
        coef_min: float = 1e-5,
        coef_max: float = 0.01,
        warmup: int = 0,
        name: str = "aent",
    ) -> None:
        """Set the bounds and how the coefficient follows the entropy.

        Args:
            coef: coefficient at the start, within ``coef_min`` and ``coef_max``; 0 = off for good.
            clamp_p: fraction of the vocabulary that is left out, from 0 to below 1.
            low: the coefficient grows while the entropy is below this, nats.
            high: the coefficient shrinks while the entropy is above this, nats.
            step: change of the coefficient per nat outside the bounds, >= 0; 0 = none.
            coef_min: smallest coefficient, >= 0.
            coef_max: largest coefficient.
            warmup: PPO iterations before the coefficient first moves, >= 0.
            name: name in the logs.
        """
        super().__init__(name, coef)
        if not 0.0 <= clamp_p < 1.0:
            raise ValueError(
                f"{self.where}.clamp_p={clamp_p} must lie in [0, 1); 0.3 is the author's"
            )
        if not 0.0 <= low <= high:
            raise ValueError(
                f"{self.where}.low={low} must lie between 0 and high={high} nats; lower it"
            )
        if not step >= 0.0:
            raise ValueError(
                f"{self.where}.step={step} must be 0 (a constant coefficient) or positive"
            )
        if not 0.0 <= coef_min <= coef_max:
            raise ValueError(
                f"{self.where}.coef_min={coef_min} must lie between 0 and coef_max={coef_max}; "
                "lower it"
            )
        if coef != 0.0 and not coef_min <= coef <= coef_max:
            raise ValueError(
                f"{self.where}.coef={coef} must be 0 (off) or within coef_min={coef_min} and "
                f"coef_max={coef_max}; widen them"
            )
        if not warmup >= 0:
            raise ValueError(f"{self.where}.warmup={warmup} must be at least 0 PPO iterations")
        self.clamp_p = clamp_p
        self.low = low
        self.high = high
        self.step = step
        self.coef_min = coef_min
        self.coef_max = coef_max
        self.warmup = warmup
        self.current = coef
        self.entropy: float | None = None  # clamped, of the rollout, nats

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the tokens that the clamping leaves of the vocabulary."""
        config = pl_module.actor_critic.policy.config  # type: ignore[union-attr]
        size = int(config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
        self.region = Region(top_k=size - int(self.clamp_p * size))
        self.regions = (self.region,)

    def observe(self, outputs: PolicyOutputs, reference: PolicyOutputs | None) -> Tensor:
        """Clamped entropy, ``[n]`` nats."""
        return outputs.entropy(self.region).region

    def adapt(self, batch: TrainingBatch) -> None:
        """Adjust the coefficient if the mean clamped entropy is out of bounds."""
        entropies = batch.observed[self.name][batch.response_mask]
        if not len(entropies):
            return
        self.entropy = entropies.double().mean().item()
        if self.coef != 0.0 and self.iteration >= self.warmup:
            outside = min(0.0, self.entropy - self.low) + max(0.0, self.entropy - self.high)
            moved = self.current - self.step * outside
            self.current = min(max(moved, self.coef_min), self.coef_max)

    def coef_at(self, iteration: int) -> float:
        """The coefficient after the rollouts so far."""
        return self.current

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        """Minus the clamped entropy, ``[n]`` nats."""
        return -outputs.entropy(self.region).region

    def logged(self) -> Mapping[str, float]:
        """Mean clamped entropy that controls the coefficient, nats."""
        return {} if self.entropy is None else {"entropy": self.entropy}

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        return {"coef": self.current}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the coefficient."""
        self.current = state_dict["coef"]
