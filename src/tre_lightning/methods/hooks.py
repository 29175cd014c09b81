"""Where an entropy method takes part in PPO.

A method is a Lightning callback. The PPO module asks the trainer for its methods and calls their
hooks in the order in which an iteration flows; each hook has a default that changes nothing:

====================  =====================================================  ====================
hook                  when                                                   on
====================  =====================================================  ====================
``check``             before any work                                        module and methods
``observe``           the policy that sampled is evaluated                   tokens of some rows
``adapt``             the rollout is scored, before the first update         the global rollout
``shape_advantages``  after that, in the order of the callbacks              the global rollout
``policy_weights``    before each update                                     a global minibatch
``token_weights``     before each update, of a :class:`LossTerm`             a global minibatch
``per_token``         in each update, of a :class:`LossTerm`                 tokens of some rows
====================  =====================================================  ====================

What a hook selects (a quantile, the top fraction) it selects over a *global* batch, so that neither
the micro-batch size nor the number of devices changes it. That is why such a choice is made from
what is known before the update: what ``observe`` kept, old log-probabilities and advantages.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.entropy import Region
from tre_lightning.ops import PolicyOutputs

POLICY, KL = "policy", "kl"
_TAKEN = (POLICY, KL, "value", "total")  # loss/<name> in the logs


@dataclass(frozen=True)
class LinearSchedule:
    """A number that moves linearly over PPO iterations and then stays.

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
            raise ValueError(
                f"LinearSchedule.iterations={self.iterations} must be at least 1 PPO iteration"
            )

    def at(self, iteration: int) -> float:
        """The value at a PPO iteration."""
        done = min(iteration / self.iterations, 1.0)
        return self.start + (self.end - self.start) * done


def value_at(value: float | LinearSchedule, iteration: int) -> float:
    """A number that may follow a schedule, at a PPO iteration."""
    return value.at(iteration) if isinstance(value, LinearSchedule) else value


def ends_of(value: float | LinearSchedule) -> tuple[float, float]:
    """Its first and last value."""
    return (value.start, value.end) if isinstance(value, LinearSchedule) else (value, value)


@dataclass(frozen=True)
class Tokens:
    """What the rollout says of the same n tokens."""

    old_logprobs: Tensor  # [n] float32, under the policy that sampled
    advantages: Tensor  # [n] float32
    positions: Tensor  # [n] int64, 0 = first token of its response
    observed: Mapping[str, Tensor]  # [n, ...] each, what ``observe`` kept, by the method's name
    ref_logprobs: Tensor | None = None  # [n] float32, under the reference, where there is one

    def __getitem__(self, rows: slice) -> "Tokens":
        return Tokens(
            self.old_logprobs[rows],
            self.advantages[rows],
            self.positions[rows],
            {name: kept[rows] for name, kept in self.observed.items()},
            None if self.ref_logprobs is None else self.ref_logprobs[rows],
        )

    @classmethod
    def of(cls, batch: TrainingBatch) -> "Tokens":
        """The counted tokens of a batch, in reading order."""
        mask = batch.response_mask
        return cls(
            batch.old_logprobs[mask],
            batch.advantages[mask],
            torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask],
            {name: kept[mask] for name, kept in batch.observed.items()},
            None if batch.ref_logprobs is None else batch.ref_logprobs[mask],
        )


class Method(Callback):
    """An entropy method; a subclass implements the hooks that it needs.

    Attributes:
        name: stands in the logs.
        iteration: PPO iteration that is running; the module sets it.
        regions: the regions whose entropies its hooks ask the outputs for.
        observed_regions: those that only ``observe`` asks for.
        needs_logits: whether its hooks ask for the logits; they cost memory, n x V numbers.
        needs_reference: whether ``observe`` asks for the initial policy, which is then kept.

    Example:
        >>> class OnlyGood(Method):
        ...     def shape_advantages(self, batch):
        ...         return batch.advantages.clamp(min=0.0)
        >>> OnlyGood("only_good").state_key
        'OnlyGood[only_good]'
    """

    regions: tuple[Region, ...] = ()
    observed_regions: tuple[Region, ...] = ()
    needs_logits: bool = False
    needs_reference: bool = False
    iteration: int = 0

    def __init__(self, name: str) -> None:
        """Two methods of one run need two names."""
        self.name = name

    @property
    def state_key(self) -> str:
        """Two methods of one class are told apart by their names."""
        return f"{type(self).__qualname__}[{self.name}]"

    @property
    def where(self) -> str:
        """Where its options stand, for messages: ``trainer.callbacks Class[name]``."""
        return f"trainer.callbacks {self.state_key}"

    def observe(self, outputs: PolicyOutputs, reference: PolicyOutputs | None) -> Tensor | None:
        """What to keep of every token as the policy that sampled sees it, ``[n, ...]``; no grad.

        Later hooks find it in ``observed[name]``. ``reference`` is the initial policy's view, where
        ``needs_reference`` asks for it.
        """
        return None

    def adapt(self, batch: TrainingBatch) -> None:
        """Adjust the method's own state to the rollout; ``state_dict`` keeps it over a resume."""

    def shape_advantages(self, batch: TrainingBatch) -> Tensor:
        """The advantages to train on, ``[B, T]``."""
        return batch.advantages

    def policy_weights(self, minibatch: TrainingBatch, key: tuple[int | str, ...]) -> Tensor | None:
        """Weight of each token in the policy loss, ``[B, T]``; None = 1 each.

        The loss stays a sum over all counted tokens divided by their number. ``key`` names the
        minibatch, for random draws (:mod:`tre_lightning.common.seeding`).
        """
        return None

    def check(self, module: LightningModule, methods: Sequence["Method"]) -> None:
        """Raise ValueError where it cannot work with the module's options and the run's methods.

        Called before any work.
        """

    def logged(self) -> Mapping[str, float]:
        """Numbers of its own, logged as ``loss/<name>_<key>`` every iteration."""
        return {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse methods whose names clash, and a run that this one cannot work in."""
        self.check(pl_module, find_methods(trainer.callbacks))  # type: ignore[attr-defined]


class LossTerm(Method, ABC):
    """A method that adds ``coef * masked mean of per_token`` to the policy loss.

    The module reduces it over the global minibatch as it reduces the policy loss. A loss is a
    function of its token alone: tokens may come in any number of parts.

    Attributes:
        current_coef: coefficient of the iteration that is running, set after ``adapt``; 0 = off.

    Example:
        >>> class TopTwenty(LossTerm):
        ...     regions = (Region(top_k=20),)
        ...     def per_token(self, outputs, tokens):
        ...         return -outputs.entropy(Region(top_k=20)).region
        >>> TopTwenty("top_twenty", coef=0.001).coef
        0.001
    """

    current_coef: float = 0.0

    def __init__(self, name: str, coef: float | LinearSchedule) -> None:
        """``coef`` 0 switches the term off; its log is ``loss/<name>``."""
        super().__init__(name)
        if not all(value >= 0.0 for value in ends_of(coef)):
            raise ValueError(
                f"{self.where}.coef={coef} must be 0 (off) or positive; use a number >= 0"
            )
        self.coef = coef

    def coef_at(self, iteration: int) -> float:
        """The coefficient at a PPO iteration; a controller's own once ``adapt`` has run."""
        return value_at(self.coef, iteration)

    @abstractmethod
    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        """Loss of each token, ``[n]``, differentiable; training lowers it."""

    def token_weights(self, minibatch: TrainingBatch) -> Tensor | None:
        """Weight of each token in this term's mean, ``[B, T]``; None = 1 each.

        The mean is a sum over all counted tokens divided by their number.
        """
        return None

    def scale(self, outputs: PolicyOutputs) -> Tensor:
        """Factor ``[n]`` by which ``per_token`` multiplies its plain form; 1 unless said.

        ``coef`` times its mean is the effective coefficient, the one to compare between methods.
        """
        return torch.ones_like(outputs.logprobs)


def find_methods(callbacks: Sequence[Callback]) -> list[Method]:
    """The methods among a trainer's callbacks.

    Raises:
        ValueError: if two of them share a name, or one has a name that the logs need.
    """
    methods = [callback for callback in callbacks if isinstance(callback, Method)]
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"trainer.callbacks: {names.count(name)} methods are named {name!r}; give each its "
                "own name"
            )
        if name in _TAKEN:
            raise ValueError(
                f"trainer.callbacks: a method is named {name!r}, as loss/{name} is; give it "
                "another name"
            )
    return methods


def loss_terms(methods: Sequence[Method]) -> list[LossTerm]:
    """Those that add to the loss."""
    return [method for method in methods if isinstance(method, LossTerm)]


def start_iteration(methods: Sequence[Method], iteration: int) -> None:
    """Tell the methods which PPO iteration begins."""
    for method in methods:
        method.iteration = iteration


def adapt(methods: Sequence[Method], batch: TrainingBatch) -> None:
    """Let the methods adapt to the rollout; each coefficient is read here, once an iteration."""
    for method in methods:
        method.adapt(batch)
    for term in loss_terms(methods):
        term.current_coef = term.coef_at(term.iteration)


def shaped(batch: TrainingBatch, methods: Sequence[Method]) -> TrainingBatch:
    """The rollout with the advantages that the methods, one after the other, make of it."""
    return reduce(
        lambda made, method: replace(made, advantages=method.shape_advantages(made)), methods, batch
    )


def weighed(
    minibatch: TrainingBatch, methods: Sequence[Method], key: tuple[int | str, ...]
) -> TrainingBatch:
    """The minibatch with the weights of the policy loss and of each term.

    Those of the policy loss multiply the weights that it comes with.
    """
    weights = dict(minibatch.weights)
    for method in methods:
        of_policy = method.policy_weights(minibatch, (*key, method.name))
        if of_policy is not None:
            weights[POLICY] = weights.get(POLICY, 1.0) * of_policy
        of_term = method.token_weights(minibatch) if isinstance(method, LossTerm) else None
        if of_term is not None:
            weights[method.name] = of_term
    return replace(minibatch, weights=weights)
