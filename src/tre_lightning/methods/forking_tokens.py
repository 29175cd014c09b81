"""Forking tokens, the "80/20 rule": policy gradient on the tokens of highest entropy only."""

from typing import Literal, get_args

from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.entropy import Region
from tre_lightning.methods.hooks import Method
from tre_lightning.methods.selection import check_fraction, fraction_of, top
from tre_lightning.ops import PolicyOutputs

Divisor = Literal["all", "selected"]


class ForkingTokens(Method):
    """Weight 1 in the policy loss for the ``fraction`` of tokens of highest entropy, else 0.

    Source: "Beyond the 80/20 Rule", Wang et al. 2025, arXiv 2506.01939. Loss of a batch B, over the
    tokens t of its responses i, H the entropy over the whole vocabulary:
    1 / sum |o_i| * sum 1[H_it >= tau] * (clipped surrogate)_it, tau the 1 - fraction quantile of H
    in B. Paper: fraction 0.2, on DAPO (clip_eps_low 0.2, clip_eps_high 0.28, no KL, no entropy
    bonus).

    The selected tokens are ceil(fraction * n) of a global minibatch of n counted tokens, at least
    1; equal entropies are taken in the order of the minibatch's rows and then of their tokens. So
    they are exactly as many as asked for, also where a threshold would let more tie. The value loss
    and the other terms stay on all tokens.

    ``average_over`` is the divisor. The paper's formula divides by the number of all tokens
    (``"all"``, the default). The authors' released code and that of the TRE paper's baseline take
    the mean over the selected tokens instead (``"selected"``: 1 / fraction times the gradient,
    which matters to ``max_grad_norm`` and beside other loss terms).

    Deviations: H is that of the policy that sampled; the paper takes that of the policy in training
    (equal at the first update of an iteration). The tokens compete in the global minibatch;
    in the released code they compete in one micro-batch of one device.
    """

    observed_regions = (Region(),)

    def __init__(
        self,
        fraction: float = 0.2,
        average_over: Divisor = "all",
        name: str = "forking_tokens",
    ) -> None:
        """Set the fraction.

        Args:
            fraction: fraction of the tokens that train the policy, above 0; 1 = all, plain PPO.
            average_over: divide by the number of all tokens or of the selected ones.
            name: name in the logs.
        """
        super().__init__(name)
        check_fraction(f"{self.where}.fraction", fraction, "0.2 is the paper's")
        if average_over not in get_args(Divisor):
            raise ValueError(
                f"{self.where}.average_over={average_over!r} is unknown; use 'all' or 'selected'"
            )
        self.fraction = fraction
        self.average_over = average_over

    def observe(self, outputs: PolicyOutputs, reference: PolicyOutputs | None) -> Tensor:
        """Entropy over the whole vocabulary, ``[n]`` nats."""
        return outputs.entropy(Region()).full

    def policy_weights(self, minibatch: TrainingBatch, key: tuple[int | str, ...]) -> Tensor:
        """1 (or tokens / selected tokens) where selected, else 0, ``[B, T]``."""
        mask = minibatch.response_mask
        count = int(mask.sum())
        selected = fraction_of(count, self.fraction, up=True)
        weights = top(minibatch.observed[self.name], mask, selected).to(minibatch.advantages)
        if self.average_over == "selected" and selected > 0:
            weights *= count / selected
        return weights
