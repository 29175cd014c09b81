"""The reference: the initial policy, which a KL penalty holds the policy near."""

import copy
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel

from tre_lightning.batches import Rollout
from tre_lightning.ops import PolicyOutputs
from tre_lightning.policy.actor_critic import ActorCritic
from tre_lightning.policy.head import HeadOptions
from tre_lightning.policy.lora import without_adapters
from tre_lightning.policy.sharding import is_sharded


class Reference:
    """The initial policy. It is no ``nn.Module``, so that no checkpoint holds it."""

    def __init__(self, policy: PreTrainedModel, *, adapters: bool) -> None:
        """A copy of the policy before any update; with adapters the policy itself without them."""
        self.adapters = adapters
        if not adapters:
            policy = copy.deepcopy(policy).requires_grad_(False)
        self.model = ActorCritic(policy, None, has_values=False)

    def outputs(self, batch: Rollout, asked: HeadOptions, device: torch.device) -> PolicyOutputs:
        """What the initial policy says of the counted tokens; it moves to ``device`` first."""
        if not is_sharded(self.model) and next(self.model.parameters()).device != device:
            self.model.to(device)
        with without_adapters(self.model) if self.adapters else nullcontext():
            outputs, _ = self.model.outputs(batch, asked)
        return outputs
