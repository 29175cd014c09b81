"""The parts of an optimiser step: parameters, and gradients over ranks."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tre_lightning.policy.actor_critic import ActorCritic
from tre_lightning.policy.sharding import whole
from tre_lightning.training.options import OptimArgs

ParameterGroup = tuple[list[nn.Parameter], float]
"""Parameters and their peak learning rate."""


def parameter_groups(model: ActorCritic, optim: OptimArgs) -> list[ParameterGroup]:
    """Those of the policy and, if there is one, the critic."""
    groups = [(model.policy_parameters(), optim.lr)]
    critic = model.critic_parameters()
    return [*groups, (critic, optim.critic_lr)] if critic else groups


def adamw(groups: Sequence[ParameterGroup], optim: OptimArgs) -> torch.optim.AdamW:
    """One optimiser of all groups, in their order."""
    return torch.optim.AdamW(
        [{"params": params, "lr": lr} for params, lr in groups],
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )


def gradient_sync(trainer: Trainer, *, last: bool) -> AbstractContextManager[None]:
    """Ranks exchange gradients once a step, with the last micro-batch."""
    wrapped = trainer.strategy.model
    if last or not isinstance(wrapped, DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


def clip_gradients(
    groups: Sequence[ParameterGroup], max_norm: float, device: torch.device
) -> list[Tensor]:
    """Scale longer gradients down to ``max_norm``; each group's norm before, ``[]`` on device."""
    return [whole(nn.utils.clip_grad_norm_(params, max_norm)).to(device) for params, _ in groups]
