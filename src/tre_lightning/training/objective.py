"""What an update minimises: clipped surrogate, KL, the terms of methods, and the value loss.

The parts of the policy's loss are computed chunk by chunk, where a chunk's logits are at hand; the
objective then adds them up, adds the critic's part, and says what the metrics count of both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.methods.hooks import KL, POLICY, LossTerm, Method, Tokens, loss_terms
from tre_lightning.ops import PolicyOutputs, Region
from tre_lightning.ops.functions import LossSum
from tre_lightning.policy.head import HeadOptions
from tre_lightning.training.kl import kl_loss
from tre_lightning.training.losses import masked_sum, policy_loss, spread, value_loss
from tre_lightning.training.options import PPOArgs


def asked_by(methods: Sequence[Method], options: HeadOptions, *regions: Region) -> HeadOptions:
    """What the hooks of these methods ask of the head, and these regions first."""
    named = (region for method in methods for region in method.regions)
    return replace(
        options,
        regions=tuple(dict.fromkeys([*regions, *named])),
        show_logits=any(method.needs_logits for method in methods),
    )


def acting(methods: Sequence[Method]) -> list[LossTerm]:
    """The terms whose coefficient is not 0."""
    return [term for term in loss_terms(methods) if term.current_coef != 0.0]


def contributing(
    batch: TrainingBatch, ppo: PPOArgs, terms: Sequence[LossTerm], kl_coef: float
) -> Tensor:
    """Responses without which loss and gradient of the policy would not be the same, ``[B]`` bool.

    The surrogate of an advantage of 0 is 0, and so is its gradient: of a group of equal scores
    nothing is learnt, unless a critic, a term or a KL penalty in the loss learns from it.
    """
    mask = batch.response_mask
    if terms or batch.values is not None or (kl_coef != 0.0 and ppo.kl_in != "reward"):
        return mask.any(1)
    return (mask & (batch.advantages != 0.0)).any(1)


class Losses(NamedTuple):
    """What a micro-batch adds to the loss of its minibatch, and what the metrics count of it."""

    total: Tensor  # [], differentiable
    parts: Mapping[str, Tensor]  # [] each, no gradient, by name in the logs; the total included
    logprobs: Tensor  # [B, T], no gradient, of the policy in training; 0 where no token counts


@dataclass(frozen=True)
class Objective:
    """The loss of a micro-batch, whose policy part is a function of its n counted tokens."""

    ppo: PPOArgs
    kl_coef: float  # of the KL to the reference in the loss; 0 = none there
    terms: Sequence[LossTerm]  # those that are on
    batch: TrainingBatch
    tokens: Tokens
    weights: Mapping[str, Tensor]  # [n] each, by the name of the part; 1 where there is none

    @classmethod
    def of(
        cls,
        micro: TrainingBatch,
        ppo: PPOArgs,
        terms: Sequence[LossTerm],
        kl_coef: float = 0.0,
    ) -> Self:
        """That of a micro-batch; ``kl_coef`` is the KL penalty's, wherever that stands."""
        weights = {name: weight[micro.response_mask] for name, weight in micro.weights.items()}
        in_loss = 0.0 if ppo.kl_in == "reward" else kl_coef
        return cls(ppo, in_loss, terms, micro, Tokens.of(micro), weights)

    @property
    def names(self) -> list[str]:
        """Of the policy's parts, in their order."""
        penalty = [KL] if self.kl_coef != 0.0 else []
        return [POLICY, *penalty, *(term.name for term in self.terms)]

    def __call__(self, rows: slice, outputs: PolicyOutputs) -> Tensor:
        """Each part's loss ``[parts, m]`` of m tokens, coefficients and weights included.

        Args:
            rows: which of the n tokens.
            outputs: what the policy says of them.
        """
        tokens = self.tokens[rows]
        surrogate = policy_loss(
            outputs.logprobs,
            tokens.old_logprobs,
            tokens.advantages,
            clip_eps_low=self.ppo.clip_eps_low,
            clip_eps_high=self.ppo.clip_eps_high,
            dual_clip=self.ppo.dual_clip,
        )
        parts = [surrogate]
        if self.kl_coef != 0.0:
            old, ref = tokens.old_logprobs, tokens.ref_logprobs
            assert ref is not None
            kl = kl_loss(self.ppo.kl_estimator, self.ppo.kl_in, outputs.logprobs, old, ref)
            parts.append(self.kl_coef * kl)
        parts += [term.current_coef * term.per_token(outputs, tokens) for term in self.terms]
        return torch.stack(
            [
                part * self.weights[name][rows] if name in self.weights else part
                for name, part in zip(self.names, parts, strict=True)
            ]
        )

    def losses(self, policy: LossSum, values: Tensor | None, count: Tensor) -> Losses:
        """This micro-batch's part of the minibatch's loss; the parts add up to the whole.

        Args:
            policy: the sum of what ``__call__`` returned of all n tokens.
            values: of the critic, ``[B, T]``; None without one.
            count: counted tokens of the global minibatch, ``[]``.
        """
        batch, mask, total = self.batch, self.batch.response_mask, policy.total
        parts = dict(zip(self.names, policy.losses.sum(1) / count, strict=True))
        if values is not None and batch.values is not None and batch.returns is not None:
            eps = self.ppo.value_clip_eps
            errors = value_loss(values, batch.values, batch.returns, value_clip_eps=eps)
            value = self.ppo.value_coef * masked_sum(errors, mask)
            parts["value"], total = (value / count).detach(), total + value
        total = total / count
        parts["total"] = total.detach()
        return Losses(total, parts, spread(policy.logprobs, mask))
