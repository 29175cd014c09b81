"""Entropy advantage: a larger advantage where the policy was uncertain."""

import torch
from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.entropy import Region
from tre_lightning.methods.hooks import Method
from tre_lightning.ops import PolicyOutputs


class EntropyAdvantage(Method):
    """Add min(alpha * H, |A| / kappa) to each advantage A, H the token's entropy, a constant.

    Source: "Reasoning with Exploration: An Entropy Perspective", Cheng et al. 2025, arXiv
    2506.14758. Said to be the paper's, not checked against it: kappa 2; alpha 0.1 for PPO and 0.4
    for GRPO. With kappa > 1 the bonus turns no advantage's sign. H is over the whole vocabulary and
    has no gradient: unlike an entropy bonus in the loss it does not push the policy to be
    uncertain.

    It is added after whitening and not whitened again, so that the mean advantage becomes positive;
    the returns of the critic stay as they were. That the paper does so, too, is our reading: no
    released code was found to compare with.

    Deviation: H is that of the policy that sampled; the paper takes that of the policy in training
    (equal at the first update of an iteration).
    """

    observed_regions = (Region(),)

    def __init__(
        self, alpha: float = 0.1, kappa: float = 2.0, name: str = "entropy_advantage"
    ) -> None:
        """Set the bonus.

        Args:
            alpha: advantage a nat of entropy, >= 0; 0 = off.
            kappa: the bonus is at most |A| / kappa, > 1.
            name: name in the logs.
        """
        super().__init__(name)
        if not alpha >= 0.0:
            raise ValueError(f"{self.where}.alpha={alpha} must be 0 (off) or positive; try 0.1")
        if not kappa > 1.0:
            raise ValueError(
                f"{self.where}.kappa={kappa} must be above 1, or the bonus could turn an "
                "advantage's sign; 2 is usual"
            )
        self.alpha = alpha
        self.kappa = kappa

    def observe(self, outputs: PolicyOutputs, reference: PolicyOutputs | None) -> Tensor:
        """Entropy over the whole vocabulary, ``[n]`` nats."""
        return outputs.entropy(Region()).full

    def shape_advantages(self, batch: TrainingBatch) -> Tensor:
        """Advantages with the bonus, ``[B, T]``; uncounted tokens keep theirs."""
        advantages = batch.advantages
        bonus = (self.alpha * batch.observed[self.name]).to(advantages)
        bonus = bonus.minimum(advantages.abs() / self.kappa)
        return torch.where(batch.response_mask, advantages + bonus, advantages)
