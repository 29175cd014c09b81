"""REPO: advantages without what makes the entropy fall."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.common.validation import positive
from tre_lightning.methods.controller import EntropyController


class REPO(EntropyController):
    """REPO-R: a larger advantage for rare tokens that were right, less blame for rare wrong ones.

    Source: "Entropy-Preserving Reinforcement Learning", Petrenko et al. 2026, arXiv 2603.11682. A
    policy-gradient step lowers the entropy as far as advantage and log-probability go together.
    REPO takes beta * (log p - E log p) off the advantage; its practical form, REPO-R, has
    beta = zeta * |A| and log p in the place of its difference to the mean:

        A > 0: A * (1 - zeta * log p), held at 0 or above
        A < 0: A * (1 + zeta * log p), held at 0 or below

    A controller doubles zeta after a rollout whose entropy is below that of the first, and halves
    it above; its size stays within ``zeta_min`` and ``zeta_max``, and where halving would leave
    that range zeta changes its sign, which lowers the entropy.

    No code of the authors was found, and of the paper only the abstract could be read in full. The
    formulas are from summaries, and from pull request 1896 of NovaSky-AI/SkyRL, which gives them
    as of the paper's appendix D.2: the holding at 0, the bounds 0.0001 and 0.05 as the paper's, and
    the change of sign. Not recovered: zeta at the start; 0.001 is that pull request's. REPO-D and
    ADAPO, the paper's other two, are left out: how far ADAPO moves its clipping could not be
    recovered.

    Deviations: log p is that of the policy that sampled; the paper takes that of the policy in
    training, a constant of the gradient (equal at the first update of an iteration). zeta moves
    before the updates on the rollout whose entropy moves it.
    """

    def __init__(
        self,
        zeta: float = 0.001,
        target: float | None = None,
        zeta_min: float = 1e-4,
        zeta_max: float = 0.05,
        adaptive: bool = True,
        name: str = "repo",
    ) -> None:
        """Set the strength and how it follows the entropy.

        Args:
            zeta: strength at the start, within ``zeta_min`` and ``zeta_max``; 0 = off for good.
            target: entropy to hold, > 0 nats; none = that of the first rollout (the paper).
            zeta_min: smallest size of zeta, > 0.
            zeta_max: largest size of zeta.
            adaptive: whether zeta follows the entropy; else it is constant.
            name: name in the logs.
        """
        super().__init__(name)
        positive(f"{self.where}.zeta_min", zeta_min)
        if not zeta_max >= zeta_min:
            raise ValueError(
                f"{self.where}.zeta_max={zeta_max} must be at least zeta_min={zeta_min}; raise it"
            )
        if zeta != 0.0 and not zeta_min <= zeta <= zeta_max:
            raise ValueError(
                f"{self.where}.zeta={zeta} must be 0 (off) or within zeta_min={zeta_min} and "
                f"zeta_max={zeta_max}; widen them"
            )
        if target is not None:
            positive(f"{self.where}.target", target)
        self.zeta_min = zeta_min
        self.zeta_max = zeta_max
        self.adaptive = adaptive
        self.target = target
        self.zeta = zeta

    def follow(self, entropy: float) -> None:
        """Double, halve or turn zeta; the first rollout sets the target unless it is given."""
        self.target = entropy if self.target is None else self.target
        if self.zeta == 0.0 or not self.adaptive or entropy == self.target:
            return
        wanted = 1.0 if entropy < self.target else -1.0  # the sign that brings the entropy back
        size = abs(self.zeta)
        if self.zeta * wanted > 0.0:
            self.zeta = wanted * min(2.0 * size, self.zeta_max)
        elif size / 2.0 >= self.zeta_min:
            self.zeta /= 2.0
        else:
            self.zeta = wanted * self.zeta_min

    def shape_advantages(self, batch: TrainingBatch) -> Tensor:
        """Rescaled advantages, ``[B, T]``; uncounted tokens keep theirs."""
        advantages = batch.advantages
        factor = 1.0 - advantages.sign() * self.zeta * batch.old_logprobs
        return torch.where(batch.response_mask, advantages * factor.clamp(min=0.0), advantages)

    def logged(self) -> Mapping[str, float]:
        """The strength, and the mean entropy and its target, nats."""
        if self.entropy is None or self.target is None:
            return {}
        return {"zeta": self.zeta, "entropy": self.entropy, "target": self.target}

    def state_dict(self) -> dict[str, Any]:
        """State to save: strength and target."""
        return {"zeta": self.zeta, "target": self.target}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore strength and target."""
        self.zeta, self.target = state_dict["zeta"], state_dict["target"]
