"""Entropy methods plug into PPO as loss terms.

A method is a Lightning callback with one pure function from the policy's outputs to a loss per
token. At each loss evaluation the PPO module asks the trainer for its loss terms, reduces each over
the global minibatch as it reduces the policy loss, multiplies by ``coef`` and adds it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tre_lightning.entropy import (
    EntropyStats,
    check_region,
    entropy_stats,
    full_entropy,
    trust_region_entropy,
)


@dataclass(frozen=True)
class LinearSchedule:
    """A coefficient that moves linearly and then stays.

    Args:
        start: value at iteration 0, >= 0.
        end: value from ``iterations`` on, >= 0.
        iterations: PPO iterations it takes to get there, >= 1.
    """

    start: float
    end: float
    iterations: int

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"coef.iterations={self.iterations} must be at least 1 PPO iteration")

    def at(self, iteration: int) -> float:
        """The value at a PPO iteration."""
        done = min(iteration / self.iterations, 1.0)
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class PolicyOutputs:
    """What the policy says of the responses of one micro-batch."""

    logits: Tensor  # [B, T, V], temperature applied
    logprobs: Tensor  # [B, T] float32, of the response tokens
    response_mask: Tensor  # [B, T] bool, True = counts
    _stats: dict[tuple[int | None, float | None], EntropyStats] = field(
        default_factory=dict, repr=False, compare=False
    )

    def entropy_stats(self, top_k: int | None, top_p: float | None) -> EntropyStats:
        """Entropies and region, ``[B, T]`` each, no gradient; searched once for each region."""
        if (top_k, top_p) not in self._stats:
            self._stats[top_k, top_p] = entropy_stats(self.logits, top_k=top_k, top_p=top_p)
        return self._stats[top_k, top_p]


class LossTerm(Callback, ABC):
    """A term of the policy loss, ``coef * masked mean of per_token``.

    A subclass implements :meth:`per_token`, and :meth:`scale` where it rescales itself. It must
    hold no state that changes between calls.
    """

    def __init__(self, name: str, coef: float | LinearSchedule) -> None:
        """``name`` stands in the logs (``loss/<name>``); ``coef`` 0 switches the term off."""
        ends = (coef.start, coef.end) if isinstance(coef, LinearSchedule) else (coef,)
        if not all(value >= 0.0 for value in ends):
            raise ValueError(f"{name}: coef={coef} must be 0 (off) or positive; use a number >= 0")
        self.name = name
        self.coef = coef

    @property
    def state_key(self) -> str:
        """Two terms of one class are told apart by their names."""
        return f"{type(self).__qualname__}[{self.name}]"

    def coef_at(self, iteration: int) -> float:
        """The coefficient at a PPO iteration."""
        return self.coef.at(iteration) if isinstance(self.coef, LinearSchedule) else self.coef

    @abstractmethod
    def per_token(self, outputs: PolicyOutputs) -> Tensor:
        """Loss of each token, ``[B, T]``, differentiable; training lowers it."""

    def scale(self, outputs: PolicyOutputs) -> Tensor:
        """Factor ``[B, T]`` by which ``per_token`` multiplies its plain form; 1 unless said.

        ``coef`` times its mean is the effective coefficient, the one to compare between methods.
        """
        return torch.ones_like(outputs.logprobs)

    def setup(self, trainer, pl_module, stage: str) -> None:  # type: ignore[no-untyped-def]
        """Refuse two terms of one name."""
        find_loss_terms(trainer.callbacks)


class TrustRegionEntropy(LossTerm):
    """TRE: raise the rescaled entropy inside the trust region only (arXiv 2602.03635)."""

    def __init__(
        self,
        coef: float | LinearSchedule = 0.001,
        top_k: int | None = None,
        top_p: float | None = None,
        rescale: bool = True,
        name: str = "tre",
    ) -> None:
        """Exactly one of ``top_k`` and ``top_p`` names the region.

        Args:
            coef: coefficient of the entropy, >= 0 (paper: 0.001), or a schedule over iterations.
            top_k: the region is this many most probable tokens (paper: 2).
            top_p: the region is the smallest nucleus of this mass (paper: 0.99).
            rescale: multiply the entropy by log|V| / log|A|.
            name: name in the logs.
        """
        super().__init__(name, coef)
        check_region(top_k, top_p)
        self.top_k = top_k
        self.top_p = top_p
        self.rescale = rescale

    def per_token(self, outputs: PolicyOutputs) -> Tensor:
        """Minus the (rescaled) entropy inside the region, ``[B, T]``."""
        return -trust_region_entropy(
            outputs.logits, top_k=self.top_k, top_p=self.top_p, rescale=self.rescale
        )

    def scale(self, outputs: PolicyOutputs) -> Tensor:
        """log|V| / log|A|, 0 where the region is one token, ``[B, T]``."""
        if not self.rescale:
            return super().scale(outputs)
        return outputs.entropy_stats(self.top_k, self.top_p).scale


class EntropyBonus(LossTerm):
    """The standard entropy bonus, over the whole vocabulary."""

    def __init__(self, coef: float | LinearSchedule = 0.001, name: str = "entropy") -> None:
        """Set the coefficient.

        Args:
            coef: coefficient of the entropy, >= 0, or a schedule over iterations.
            name: name in the logs.
        """
        super().__init__(name, coef)

    def per_token(self, outputs: PolicyOutputs) -> Tensor:
        """Minus the entropy over the whole vocabulary, ``[B, T]``."""
        return -full_entropy(outputs.logits)


def find_loss_terms(callbacks: Sequence[Callback]) -> list[LossTerm]:
    """The loss terms among a trainer's callbacks.

    Raises:
        ValueError: if two of them share a name.
    """
    terms = [callback for callback in callbacks if isinstance(callback, LossTerm)]
    names = [term.name for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{names.count(name)} loss terms are named {name!r}; give each its own name"
            )
    return terms
