"""What an update minimises in the policy: the clipped surrogate, KL and the terms of methods."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.methods.hooks import KL, POLICY, LossTerm, PolicyOutputs, Tokens
from tre_lightning.training.kl import kl_loss
from tre_lightning.training.losses import policy_loss
from tre_lightning.training.options import PPOArgs


@dataclass(frozen=True)
class PolicyObjective:
    """The parts of the policy's loss on the n counted tokens of a micro-batch."""

    ppo: PPOArgs
    kl_coef: float  # of the KL to the reference in the loss; 0 = none there
    coefs: Mapping[LossTerm, float]  # of the terms that are on
    tokens: Tokens
    weights: Mapping[str, Tensor]  # [n] each, by the name of the part; 1 where there is none

    @classmethod
    def of(
        cls,
        micro: TrainingBatch,
        ppo: PPOArgs,
        coefs: Mapping[LossTerm, float],
        kl_coef: float = 0.0,
    ) -> Self:
        """That of a micro-batch; ``kl_coef`` is the KL penalty's, wherever that stands."""
        weights = {name: weight[micro.response_mask] for name, weight in micro.weights.items()}
        in_loss = 0.0 if ppo.kl_in == "reward" else kl_coef
        return cls(ppo, in_loss, coefs, Tokens.of(micro), weights)

    @property
    def names(self) -> list[str]:
        """Of the parts, in their order."""
        penalty = [KL] if self.kl_coef != 0.0 else []
        return [POLICY, *penalty, *(term.name for term in self.coefs)]

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
        parts += [coef * term.per_token(outputs, tokens) for term, coef in self.coefs.items()]
        return torch.stack(
            [
                part * self.weights[name][rows] if name in self.weights else part
                for name, part in zip(self.names, parts, strict=True)
            ]
        )
