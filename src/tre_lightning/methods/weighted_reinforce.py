"""PSR, NSR and W-REINFORCE: learn from right responses, from wrong ones, or from both unequally."""

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.common.validation import at_least
from tre_lightning.methods.hooks import Method


class WeightedReinforce(Method):
    """Advantage ``positive`` for every token of a right response, -``negative`` of a wrong one.

    Source: "The Surprising Effectiveness of Negative Reinforcement in LLM Reasoning", Zhu et al.
    2025, arXiv 2506.01347, with the authors' code (TianHongZXY/RLVR-Decomposed, commit a5d4e7c).
    REINFORCE with a reward of 1 or -1 is the sum of positive and negative sample reinforcement:

    ==============  ============  ============
    method          ``positive``  ``negative``
    ==============  ============  ============
    PSR             1             0
    NSR             0             1
    W-REINFORCE     0.1           1
    ==============  ============  ============

    0.1 is the paper's lambda. A response is right if its score is above ``threshold``. There is no
    baseline and no whitening: what the estimator made of the scores is replaced, so a KL penalty in
    the reward and methods before it that shape advantages are refused; those that stand later in
    the list shape these advantages. It takes no critic: ``model.policy.critic: none`` with any
    estimator for it saves one.

    Deviations: PSR and NSR leave out the responses of the other kind; the authors also leave them
    out of the number that the loss is divided by, here the divisor stays the number of all counted
    tokens. The authors' scores are 0 or 1, hence ``threshold``.
    """

    def __init__(
        self,
        positive: float = 0.1,
        negative: float = 1.0,
        threshold: float = 0.5,
        name: str = "weighted_reinforce",
    ) -> None:
        """Set the two strengths, and what is right.

        Args:
            positive: advantage of a right response, >= 0.
            negative: minus the advantage of a wrong response, >= 0; not both 0.
            threshold: a response is right if its score is above this.
            name: name in the logs.
        """
        super().__init__(name)
        at_least(f"{self.where}.positive", positive, 0.0)
        at_least(f"{self.where}.negative", negative, 0.0)
        if positive == negative == 0.0:
            raise ValueError(
                f"{self.where}.positive=0 and negative=0 leave nothing to learn; give one of them"
            )
        if not math.isfinite(threshold):
            raise ValueError(f"{self.where}.threshold={threshold} must be a number")
        self.positive = positive
        self.negative = negative
        self.threshold = threshold

    def check(self, module: LightningModule, methods: Sequence[Method]) -> None:
        """Refuse what it would silently undo."""
        ppo = module.ppo_args
        if ppo.kl_coef != 0.0 and ppo.kl_in == "reward":  # type: ignore[union-attr]
            raise ValueError(
                f"model.ppo.kl_coef={ppo.kl_coef} is in the reward, which "  # type: ignore[union-attr]
                f"{self.where} replaces; set model.ppo.kl_in to loss, or the coefficient to 0"
            )
        for earlier in methods[: methods.index(self)]:
            if type(earlier).shape_advantages is not Method.shape_advantages:
                raise ValueError(
                    f"{self.where} replaces the advantages that {earlier.state_key}, which stands "
                    "before it, shapes; put it first"
                )

    def shape_advantages(self, batch: TrainingBatch) -> Tensor:
        """``positive`` or -``negative``, ``[B, T]``; uncounted tokens keep their advantage."""
        right = (batch.scores > self.threshold).unsqueeze(1)
        made = torch.full_like(batch.advantages, -self.negative)
        made.masked_fill_(right, self.positive)
        return torch.where(batch.response_mask, made, batch.advantages)
