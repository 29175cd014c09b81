"""Entropy methods plug into PPO as loss terms.

A method is a Lightning callback with one pure function from the policy's outputs to a loss per
token. At each loss evaluation the PPO module asks the trainer for its loss terms, reduces each over
the global minibatch as it reduces the policy loss, multiplies by ``coef`` and adds it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tre_lightning.entropy import EntropyStats, check_region
from tre_lightning.ops.region import Region


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
    """What the policy says of some response tokens, n in all, padding left out."""

    logprobs: Tensor  # [n] float32, of the response tokens
    entropies: Mapping[Region, EntropyStats]  # [n] each, of the regions that the terms name
    logits: Tensor | None = None  # [n, V], temperature applied, if a term has ``needs_logits``

    def entropy(self, region: Region) -> EntropyStats:
        """Entropies and region of each token; ``region`` and ``scaled`` are differentiable.

        Raises:
            ValueError: if no term's ``regions`` names this region.
        """
        if region not in self.entropies:
            raise ValueError(f"{region} is not at hand; name it in the loss term's `regions`")
        return self.entropies[region]


class LossTerm(Callback, ABC):
    """A term of the policy loss, ``coef * masked mean of per_token``.

    A subclass implements :meth:`per_token`, and :meth:`scale` where it rescales itself. It must
    hold no state that changes between calls. A loss is a function of its token alone: tokens may
    come in any number of parts.

    Attributes:
        regions: the regions whose entropies it asks the outputs for.
        needs_logits: whether it asks for the logits; they cost memory, n x V numbers.
    """

    regions: tuple[Region, ...] = ()
    needs_logits: bool = False

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
        """Loss of each token, ``[n]``, differentiable; training lowers it."""

    def scale(self, outputs: PolicyOutputs) -> Tensor:
        """Factor ``[n]`` by which ``per_token`` multiplies its plain form; 1 unless said.

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
        self.region = Region(top_k, top_p)
        self.regions = (self.region,)
        self.rescale = rescale

    def per_token(self, outputs: PolicyOutputs) -> Tensor:
        """Minus the (rescaled) entropy inside the region, ``[n]``."""
        stats = outputs.entropy(self.region)
        return -(stats.scaled if self.rescale else stats.region)

    def scale(self, outputs: PolicyOutputs) -> Tensor:
        """log|V| / log|A|, 0 where the region is one token, ``[n]``."""
        if not self.rescale:
            return super().scale(outputs)
        return outputs.entropy(self.region).scale


class EntropyBonus(LossTerm):
    """The standard entropy bonus, over the whole vocabulary."""

    regions = (Region(),)

    def __init__(self, coef: float | LinearSchedule = 0.001, name: str = "entropy") -> None:
        """Set the coefficient.

        Args:
            coef: coefficient of the entropy, >= 0, or a schedule over iterations.
            name: name in the logs.
        """
        super().__init__(name, coef)

    def per_token(self, outputs: PolicyOutputs) -> Tensor:
        """Minus the entropy over the whole vocabulary, ``[n]``."""
        return -outputs.entropy(Region()).region


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
