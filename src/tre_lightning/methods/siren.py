"""SIREN: hold the entropy of the most uncertain tokens at its initial value."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tre_lightning.entropy import check_region
from tre_lightning.experience import TrainingBatch
from tre_lightning.methods.hooks import LinearSchedule, LossTerm, PolicyOutputs, Tokens
from tre_lightning.methods.selection import check_share, share_of, top
from tre_lightning.ops.region import Region


class SIREN(LossTerm):
    """Selective entropy regularisation: beta * (mean entropy - anchor)^2 on chosen tokens.

    Source: "Rethinking Entropy Regularization in Large Reasoning Models", Jiang et al. 2025, arXiv
    2509.25133, with the authors' code (Linn3a/siren). Three parts:

    * top-p mask: H_t is the entropy of the renormalised nucleus of mass ``top_p``;
    * peak-entropy mask: only the tokens whose H_t lies above the tau quantile count, the ``share``
      = 1 - tau of highest H_t;
    * self-anchored: beta * (mean H over these - anchor)^2, the anchor being the initial mean.

    The authors' script has beta 0.005, top_p 0.8 and tau 0.8: ``coef`` 0.005, ``share`` 0.2.

    A square of a mean is no sum over tokens. The term is its linearisation at the policy that
    sampled: coefficient 2 * beta * (mean - anchor), times the mean of H over the chosen tokens.
    The gradient is that of the square at the first update of an iteration; within the iteration
    the coefficient does not follow the policy. It is positive (lowers the entropy) above the
    anchor, negative below, and 0 in the first iteration, which measures the anchor.
    ``loss/siren`` is this linear term, not the square.

    Deviations: the mean behind the coefficient and the anchor is over the global rollout; the
    authors take one micro-batch of one device (how they measure the anchor could not be recovered).
    The chosen tokens are ceil(share * n) of the n of a global minibatch (of the rollout for mean
    and anchor), from the entropies of the policy that sampled; the authors take the quantile within
    each response, from the policy in training. The nucleus holds the token that crosses ``top_p``,
    as everywhere here; in the authors' code it does not, and stops at 10000 tokens.
    """

    def __init__(
        self,
        coef: float | LinearSchedule = 0.005,
        top_p: float = 0.8,
        share: float = 0.2,
        name: str = "siren",
    ) -> None:
        """Set strength and masks.

        Args:
            coef: beta, >= 0, or a schedule over iterations; 0 = off.
            top_p: mass of the nucleus, above 0 and below 1.
            share: share of the tokens, those of highest entropy, above 0 and at most 1.
            name: name in the logs.
        """
        super().__init__(name, coef)
        check_region(None, top_p, self.where)
        check_share(f"{self.where}.share", share, "coef=0 switches it off")
        self.region = Region(top_p=top_p)
        self.regions = (self.region,)
        self.share = share
        self.anchor: float | None = None  # nats
        self.entropy = 0.0  # of the chosen tokens of the rollout, nats

    def observe(self, outputs: PolicyOutputs, reference: PolicyOutputs | None) -> Tensor:
        """Entropy of the nucleus, ``[n]`` nats."""
        return outputs.entropy(self.region).region

    def adapt(self, batch: TrainingBatch) -> None:
        """Measure the mean entropy of the chosen tokens; the first one is the anchor."""
        entropies = batch.observed[self.name][self._peaks(batch)]
        if len(entropies):
            self.entropy = entropies.double().mean().item()
            self.anchor = self.entropy if self.anchor is None else self.anchor

    def coef_at(self, iteration: int) -> float:
        """2 * beta * (mean - anchor), of any sign; 0 before the first rollout."""
        gap = 0.0 if self.anchor is None else self.entropy - self.anchor
        return 2.0 * super().coef_at(iteration) * gap

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        """Entropy of the nucleus, ``[n]`` nats."""
        return outputs.entropy(self.region).region

    def token_weights(self, minibatch: TrainingBatch) -> Tensor:
        """Tokens / chosen at the chosen, else 0, ``[B, T]``: makes the mean one over the chosen."""
        peaks = self._peaks(minibatch)
        scale = int(minibatch.response_mask.sum()) / max(1, int(peaks.sum()))
        return peaks.to(minibatch.advantages) * scale

    def logged(self) -> Mapping[str, float]:
        """The anchor, and the mean entropy that is held at it, nats."""
        return {} if self.anchor is None else {"anchor": self.anchor, "entropy": self.entropy}

    def state_dict(self) -> dict[str, Any]:
        """The anchor."""
        return {"anchor": self.anchor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the anchor of the run."""
        self.anchor = state_dict["anchor"]

    def _peaks(self, batch: TrainingBatch) -> Tensor:
        """The tokens of highest entropy, ``[B, T]`` bool."""
        mask = batch.response_mask
        count = share_of(int(mask.sum()), self.share, up=True)
        return top(batch.observed[self.name], mask, count)
