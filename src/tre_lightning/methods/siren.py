"""SIREN: hold the entropy of the most uncertain tokens at its initial value."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.common.validation import one_of
from tre_lightning.entropy import Region, check_region
from tre_lightning.methods.hooks import LinearSchedule, LossTerm, Tokens
from tre_lightning.methods.selection import above_quantile, check_fraction, fraction_of, top
from tre_lightning.ops import PolicyOutputs

Within = Literal["rollout", "response"]


class SIREN(LossTerm):
    """Selective entropy regularisation: beta * (mean entropy - anchor)^2 on chosen tokens.

    Source: "Rethinking Entropy Regularization in Large Reasoning Models", Jiang et al. 2025, arXiv
    2509.25133, with the authors' code (Linn3a/siren). Three parts:

    * top-p mask: H_t is the entropy of the renormalised nucleus of mass ``top_p``;
    * peak-entropy mask: only the tokens whose H_t lies above the tau quantile count, the
      ``fraction`` = 1 - tau of highest H_t;
    * self-anchored: beta * (mean H over these - anchor)^2, the anchor being the initial mean.

    The authors' script has beta 0.005, top_p 0.8 and tau 0.8: ``coef`` 0.005, ``fraction`` 0.2.

    ``within`` says among which tokens the quantile and the mean are taken. ``rollout``, our choice:
    the ceil(fraction * n) highest of the n of a global minibatch (of the rollout for mean and
    anchor), and the mean over them, every token alike. ``response``, the authors': the tokens above
    the tau quantile of their own response, the mean over these in each response, and then over
    responses, every response alike; a response without such a token (it has one token, or all are
    equal) counts as 0. The authors' first commits took the anchor from one micro-batch; since the
    commit 5cb224d (December 2025) it is this mean at the first step, over the whole first rollout.

    A square of a mean is no sum over tokens. The term is its linearisation at the policy that
    sampled: coefficient 2 * beta * (mean - anchor), times the mean of H over the chosen tokens.
    The gradient is that of the square at the first update of an iteration; within the iteration
    the coefficient does not follow the policy. It is positive (lowers the entropy) above the
    anchor, negative below, and 0 in the first iteration, which measures the anchor.
    ``loss/siren`` is this linear term, not the square.

    Deviations: ``within`` is ``rollout`` unless set. The mean that sets the coefficient is over the
    global rollout; the authors take one micro-batch of one device. The tokens are chosen by the
    entropies of the policy that sampled; the authors' by those of the policy in training. The
    nucleus holds the token that crosses ``top_p``, as everywhere here; in the authors' code it does
    not, and stops at 10000 tokens.
    """

    def __init__(
        self,
        coef: float | LinearSchedule = 0.005,
        top_p: float = 0.8,
        fraction: float = 0.2,
        within: Within = "rollout",
        name: str = "siren",
    ) -> None:
        """Set strength and masks.

        Args:
            coef: beta, >= 0, or a schedule over iterations; 0 = off.
            top_p: mass of the nucleus, above 0 and below 1.
            fraction: fraction of the tokens, those of highest entropy, above 0 and at most 1.
            within: what the fraction and the means are of: the whole ``rollout``, or each
                ``response``, as in the authors' code.
            name: name in the logs.
        """
        super().__init__(name, coef)
        check_region(top_p=top_p, owner=self.where)
        check_fraction(f"{self.where}.fraction", fraction, "coef=0 switches it off")
        one_of(f"{self.where}.within", within, get_args(Within))
        self.region = Region(top_p=top_p)
        self.regions = (self.region,)
        self.fraction = fraction
        self.within = within
        self.anchor: float | None = None  # nats
        self.entropy = 0.0  # of the chosen tokens of the rollout, nats

    def observe(self, outputs: PolicyOutputs, reference: PolicyOutputs | None) -> Tensor:
        """Entropy of the nucleus, ``[n]`` nats."""
        return outputs.entropy(self.region).region

    def adapt(self, batch: TrainingBatch) -> None:
        """Measure the mean entropy of the chosen tokens; the first one becomes the anchor."""
        weights = self._mean_weights(batch)
        if weights.any():
            chosen = weights > 0.0
            entropies = batch.observed[self.name][chosen].double()
            self.entropy = (weights[chosen] * entropies).sum().item()
            self.anchor = self.entropy if self.anchor is None else self.anchor

    def coef_at(self, iteration: int) -> float:
        """2 * beta * (mean - anchor), of any sign; 0 before the first rollout."""
        gap = 0.0 if self.anchor is None else self.entropy - self.anchor
        return 2.0 * super().coef_at(iteration) * gap

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        """Entropy of the nucleus, ``[n]`` nats."""
        return outputs.entropy(self.region).region

    def token_weights(self, minibatch: TrainingBatch) -> Tensor:
        """Number of tokens x weight in the mean, ``[B, T]``: makes the mean one over the chosen."""
        weights = self._mean_weights(minibatch) * minibatch.response_mask.sum()
        return weights.to(minibatch.advantages)

    def logged(self) -> Mapping[str, float]:
        """The anchor and the mean entropy, nats."""
        return {} if self.anchor is None else {"anchor": self.anchor, "entropy": self.entropy}

    def state_dict(self) -> dict[str, Any]:
        """The anchor."""
        return {"anchor": self.anchor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the anchor."""
        self.anchor = state_dict["anchor"]

    def _mean_weights(self, batch: TrainingBatch) -> Tensor:
        """Weight of each token in the mean entropy, ``[B, T]`` float64; 0 at what is not chosen."""
        entropies, mask = batch.observed[self.name], batch.response_mask
        if self.within == "response":
            peaks = above_quantile(entropies, mask, self.fraction)
            responses = mask.any(1).sum()
            parts = peaks.sum(1, keepdim=True) * responses
        else:
            peaks = top(entropies, mask, fraction_of(int(mask.sum()), self.fraction, up=True))
            parts = peaks.sum()
        return peaks.double() / parts.clamp(min=1)
