"""Entrocraft: keep the entropy on a schedule by leaving out what would push it off."""

from collections.abc import Mapping

from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.common.validation import at_least
from tre_lightning.methods.controller import EntropyController
from tre_lightning.methods.hooks import LinearSchedule, ends_of, value_at


class Entrocraft(EntropyController):
    """Train on everything within a band of entropies, outside it on one sign of advantage alone.

    Source: "Addressing Performance Saturation for LLM RL via Precise Entropy Curve Control", Li et
    al. 2026, arXiv 2604.26326, algorithm 1, with the authors' code (lblaoke/entrocraft, commit
    26165bd). Positive advantages lower the entropy, negative ones raise it. With H the mean entropy
    of the rollout and m = [H > high] - [H < low], what has m * A < 0 is rejected, and the policy
    loss is the mean over the rest.

    Both bounds may follow a schedule, the paper's point: linear annealing was best there. The
    authors' example falls from 0.6, 0.7 to 0.4, 0.5 over a whole run (Qwen3-4B-Base); others end
    at 0.1, 0.2. Off = a band that the entropy cannot leave (``low`` 0, ``high`` 100).

    Deviations: tokens are rejected by their own advantage and the mean is over all the tokens kept
    of a global minibatch; the paper rejects responses and takes the mean over those kept of each
    prompt. With one advantage a response, as all estimators without a critic give it, the same
    tokens are kept. The code differs from the paper in that it trains, outside the band, on the
    plain scores instead of the estimator's advantages; here it is the paper's algorithm.
    """

    def __init__(
        self,
        low: float | LinearSchedule = 0.6,
        high: float | LinearSchedule = 0.7,
        name: str = "entrocraft",
    ) -> None:
        """Set the band.

        Args:
            low: below this entropy only advantages of at most 0 train, >= 0 nats, or a schedule.
            high: above it only advantages of at least 0 do, >= ``low`` nats, or a schedule.
            name: name in the logs.
        """
        super().__init__(name)
        for least, most in zip(ends_of(low), ends_of(high), strict=True):
            at_least(f"{self.where}.low", least, 0.0)
            if not most >= least:
                raise ValueError(
                    f"{self.where}.high={most} must be at least low={least} nats, at the start and "
                    "the end of a schedule; raise it"
                )
        self.low = low
        self.high = high
        self.side = 0  # of the band: 1 above, -1 below

    def follow(self, entropy: float) -> None:
        """See on which side of the band the entropy is."""
        low, high = (value_at(bound, self.iteration) for bound in (self.low, self.high))
        self.side = (entropy > high) - (entropy < low)

    def policy_weights(self, minibatch: TrainingBatch, key: tuple[int | str, ...]) -> Tensor:
        """Tokens / kept tokens where kept, else 0, ``[B, T]``."""
        mask = minibatch.response_mask
        kept = mask & (minibatch.advantages * self.side >= 0.0)
        return kept.to(minibatch.advantages) * (mask.sum() / kept.sum().clamp(min=1))

    def logged(self) -> Mapping[str, float]:
        """The mean entropy and the band, nats."""
        if self.entropy is None:
            return {}
        bounds = {"low": self.low, "high": self.high}
        band = {name: value_at(bound, self.iteration) for name, bound in bounds.items()}
        return {"entropy": self.entropy, **band}
