"""Adaptive entropy control: an entropy bonus that acts only below a target entropy."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tre_lightning.entropy import Region
from tre_lightning.methods.controller import EntropyController
from tre_lightning.methods.hooks import LossTerm, Tokens
from tre_lightning.ops import PolicyOutputs


class AdaptiveEntropy(EntropyController, LossTerm):
    """An entropy bonus whose coefficient is raised below a target entropy and lowered above it.

    Source: "Skywork Open Reasoner 1", He et al. 2025, arXiv 2505.22312, section 3.2.5, with the
    authors' code (SkyworkAI/Skywork-OR1). The loss is -alpha_k * mean H over the whole vocabulary.
    With e_k the entropy of the policy that sampled in iteration k:

        alpha_k = c_k if e_k <= target else 0
        c_{k+1} = c_k + delta if e_k < target, c_k - delta if e_k > target

    c_k is held between ``min_coef`` and ``max_coef``. Paper: target 0.2 for all released models,
    delta 0.005 in the ablation. The released scripts start at 0 and take delta 0.0001,
    ``min_coef`` 0 and ``max_coef`` 0.005. With ``min_coef`` above 0 the bonus acts at once where
    the entropy falls below the target, however long it has been above. Off = ``delta`` 0 with
    ``coef`` 0, or ``max_coef`` 0: ``coef`` 0 alone is where the authors start, not off.

    Deviations: e_k is the exact entropy; the authors' code takes -mean log p of the sampled tokens,
    and lets e_{k-1} decide on alpha_k (here the paper's formula). At e_k = target c_k stays; in
    their code it falls. Whether the paper holds c_k at 0 or above could not be recovered; their
    code does (``min_ent_coef`` 0 in its scripts).
    """

    regions = (Region(),)

    def __init__(
        self,
        coef: float = 0.0,
        target: float = 0.2,
        delta: float = 0.005,
        max_coef: float | None = None,
        min_coef: float = 0.0,
        name: str = "adaptive_entropy",
    ) -> None:
        """Set the target entropy and how the coefficient follows it.

        Args:
            coef: coefficient c_0 of the first iteration, >= ``min_coef``.
            target: entropy to hold, > 0 nats.
            delta: change of the coefficient an iteration, >= 0; 0 = none.
            max_coef: largest coefficient, >= ``coef``; none = no limit.
            min_coef: smallest coefficient, >= 0; the bonus stays off above the target all the same.
            name: name in the logs.
        """
        super().__init__(name, coef)
        if not target > 0.0:
            raise ValueError(
                f"{self.where}.target={target} must be above 0 nats; 0.2 is the paper's"
            )
        if not delta >= 0.0:
            raise ValueError(f"{self.where}.delta={delta} must be 0 (constant) or positive")
        if max_coef is not None and not max_coef >= coef:
            raise ValueError(
                f"{self.where}.max_coef={max_coef} must be at least coef={coef}; raise it or give "
                "none"
            )
        if not 0.0 <= min_coef <= coef:
            raise ValueError(
                f"{self.where}.min_coef={min_coef} must lie between 0 and coef={coef}; lower it or "
                "raise coef"
            )
        self.target = target
        self.delta = delta
        self.max_coef = max_coef
        self.min_coef = min_coef
        self.following = coef  # c_{k+1}
        self.used = 0.0  # alpha_k

    def follow(self, entropy: float) -> None:
        """Switch the bonus on or off, and adjust the coefficient of the next iteration."""
        self.used = self.following if entropy <= self.target else 0.0
        moved = self.following + self.delta * ((entropy < self.target) - (entropy > self.target))
        most = moved if self.max_coef is None else min(moved, self.max_coef)
        self.following = max(self.min_coef, most)

    def coef_at(self, iteration: int) -> float:
        """alpha_k; 0 before the first rollout."""
        return self.used

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        """Minus the entropy over the whole vocabulary, ``[n]`` nats."""
        return -outputs.entropy(Region()).region

    def logged(self) -> Mapping[str, float]:
        """Mean entropy that controls the coefficient (nats), and the next iteration's c."""
        if self.entropy is None:
            return {}
        return {"entropy": self.entropy, "next_coef": self.following}

    def state_dict(self) -> dict[str, Any]:
        """The coefficient of the next iteration."""
        return {"coef": self.following}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the coefficient."""
        self.following = state_dict["coef"]
