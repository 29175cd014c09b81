"""PAEC: a lower bound on the entropy of the tokens where candidates compete."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.entropy import Region, check_region
from tre_lightning.methods.hooks import LinearSchedule, LossTerm, Tokens
from tre_lightning.methods.selection import check_fraction, fraction_of, top
from tre_lightning.ops import PolicyOutputs

_TWO = Region(top_k=2)


class PAEC(LossTerm):
    """Position-aware entropy calibration: beta * max(0, floor - masked mean entropy)^2.

    Source: "PAEC: Position-Aware Entropy Calibration for LLM Reasoning in RLVR", Yang et al. 2026,
    arXiv 2606.08543. There is no public code, and only the abstract could be read in full; the rest
    is from summaries of the paper. From these:

    * each position is scored by the normalised entropy of its top-p nucleus and by how closely its
      two most probable tokens compete (their log-probability gap), as a weighted sum without
      gradient; the positions above the quantile rho = 0.8 of the score get a soft mask m_t;
    * the masked mean entropy is sum m_t H_t / sum m_t;
    * the anchor is that mean over the first 4 steps, the floor rho_min * anchor, and the penalty
      max(0, floor - masked mean)^2: it acts only below the floor.

    Not recovered, and our choice: H_t is the entropy of the nucleus; ``top_p`` 0.9; competition is
    the entropy of the two renormalised candidates over log 2, which falls with their gap from 1 to
    0; the score is (1 - mix) * H_t / log|nucleus| + mix * competition, ``mix`` 0.5; m_t is the
    score itself, 0 below the quantile; ``floor_fraction`` (rho_min) 0.8; ``coef`` (beta) 0.005. A
    summary also names an entropy bonus beside the penalty; it is left out, add
    :class:`~tre_lightning.methods.TrustRegionEntropy` or another term for it.

    A square of a mean is no sum over tokens. The term is its linearisation at the policy that
    sampled: coefficient 2 * beta * max(0, floor - masked mean), times minus the masked mean of the
    policy in training. Scores, masks and means are those of the policy that sampled: coefficient
    and anchor over the global rollout, m_t over the global minibatch, ceil(fraction * n) tokens of
    n. The gradient is that of the penalty at the first update of an iteration. ``loss/paec`` is
    this linear term, not the square.
    """

    def __init__(
        self,
        coef: float | LinearSchedule = 0.005,
        top_p: float = 0.9,
        fraction: float = 0.2,
        mix: float = 0.5,
        anchor_iterations: int = 4,
        floor_fraction: float = 0.8,
        name: str = "paec",
    ) -> None:
        """Set the penalty, its floor and the mask.

        Args:
            coef: beta, >= 0, or a schedule over iterations; 0 = off.
            top_p: mass of the nucleus, above 0 and below 1.
            fraction: fraction of the tokens, those of highest score, above 0 and at most 1.
            mix: weight of the top-two competition in the score, from 0 to 1.
            anchor_iterations: PPO iterations that the anchor is the mean of, >= 1.
            floor_fraction: floor over anchor, above 0 and at most 1.
            name: name in the logs.
        """
        super().__init__(name, coef)
        check_region(top_p=top_p, owner=self.where)
        check_fraction(f"{self.where}.fraction", fraction, "coef=0 switches it off")
        if not 0.0 <= mix <= 1.0:
            raise ValueError(f"{self.where}.mix={mix} must lie in [0, 1]; 0.5 weighs both alike")
        if not anchor_iterations >= 1:
            raise ValueError(
                f"{self.where}.anchor_iterations={anchor_iterations} must be at least 1 "
                "PPO iteration"
            )
        check_fraction(f"{self.where}.floor_fraction", floor_fraction, "1 = the anchor")
        self.region = Region(top_p=top_p)
        self.regions = (self.region,)
        self.observed_regions = (_TWO,)
        self.fraction = fraction
        self.mix = mix
        self.anchor_iterations = anchor_iterations
        self.floor_fraction = floor_fraction
        self.first: list[float] = []  # masked means of the first iterations, nats
        self.entropy = 0.0  # masked mean of the rollout, nats

    def observe(self, outputs: PolicyOutputs, reference: PolicyOutputs | None) -> Tensor:
        """Score in [0, 1] and entropy of the nucleus in nats, ``[n, 2]``."""
        nucleus = outputs.entropy(self.region)
        normalised = nucleus.region / nucleus.size.clamp(min=2).to(nucleus.region).log()
        competition = outputs.entropy(_TWO).region / math.log(2.0)
        score = (1.0 - self.mix) * normalised + self.mix * competition
        return torch.stack([score, nucleus.region], -1)

    def adapt(self, batch: TrainingBatch) -> None:
        """Measure the masked mean entropy; the first few set the anchor."""
        mask = self._mask(batch)
        chosen = mask > 0.0
        if not chosen.any():
            return
        weights = mask[chosen].double()
        entropies = batch.observed[self.name][..., 1][chosen].double()
        self.entropy = ((weights * entropies).sum() / weights.sum()).item()
        if len(self.first) < self.anchor_iterations:
            self.first = [*self.first, self.entropy]

    @property
    def anchor(self) -> float | None:
        """Mean entropy of the first iterations, nats; None until they are done."""
        enough = len(self.first) == self.anchor_iterations
        return sum(self.first) / len(self.first) if enough else None

    def coef_at(self, iteration: int) -> float:
        """2 * beta * (how far the masked mean lies below the floor); 0 while there is no anchor."""
        floor = 0.0 if self.anchor is None else self.floor_fraction * self.anchor
        return 2.0 * super().coef_at(iteration) * max(0.0, floor - self.entropy)

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        """Minus the entropy of the nucleus, ``[n]`` nats."""
        return -outputs.entropy(self.region).region

    def token_weights(self, minibatch: TrainingBatch) -> Tensor:
        """Tokens * m_t / sum m, ``[B, T]``: makes the mean the masked mean."""
        mask = self._mask(minibatch)
        total = mask.sum()
        count = int(minibatch.response_mask.sum())
        return mask * (count / total) if total > 0.0 else mask

    def logged(self) -> Mapping[str, float]:
        """The masked mean entropy, and the anchor once there is one, nats."""
        if not self.first:
            return {}
        anchor = {} if self.anchor is None else {"anchor": self.anchor}
        return {"entropy": self.entropy, **anchor}

    def state_dict(self) -> dict[str, Any]:
        """State to save: the means that the anchor averages."""
        return {"first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the anchor."""
        self.first = list(state_dict["first"])

    def _mask(self, batch: TrainingBatch) -> Tensor:
        """Soft mask m, ``[B, T]``; 0 outside the chosen tokens."""
        scores, counted = batch.observed[self.name][..., 0], batch.response_mask
        chosen = top(scores, counted, fraction_of(int(counted.sum()), self.fraction, up=True))
        return torch.where(chosen, scores, 0.0)
