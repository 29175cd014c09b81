"""What the language model's head says of the counted response tokens, and of a loss of them.

Three ways to the same numbers. *Fused*: from hidden states, never more than a chunk of logits.
*Logits*: the same ops from all the logits, for a head that is more than a linear layer (soft
capping, scaled logits) and for a loss term that asks for the logits. *Reference*: the logits and
:mod:`tre_lightning.entropy`, the readable form that the others are checked against.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tre_lightning.entropy import EntropyStats, entropy_stats, full_entropy, trust_region_entropy
from tre_lightning.ops import PolicyOutputs, Region
from tre_lightning.ops.functions import (
    LossSum,
    fused_linear_loss,
    fused_linear_token_stats,
    token_stats,
)
from tre_lightning.policy.reading import trunk_of

TokenLosses = Callable[[slice, PolicyOutputs], Tensor]


@dataclass(frozen=True)
class HeadOptions:
    """What is asked of the head, and how it is computed.

    Args:
        regions: those whose entropies are wanted.
        temperature: the logits are divided by it.
        memory: bytes of logits held at a time by the fused way.
        fused: use the ops; else the reference.
        show_logits: the outputs hold the logits.
    """

    regions: tuple[Region, ...]
    temperature: float
    memory: int
    fused: bool = True
    show_logits: bool = False

    @property
    def takes_hidden(self) -> bool:
        """Whether hidden states are enough."""
        return self.fused and not self.show_logits


def head_outputs(
    source: Tensor, head: nn.Linear | None, labels: Tensor, asked: HeadOptions
) -> PolicyOutputs:
    """Log-probabilities of the labels and the entropies, differentiable.

    Args:
        source: last hidden states ``[n, D]``, which ``head`` is for; without it logits ``[n, V]``.
        head: the linear layer from hidden states to logits, or None.
        labels: token ids ``[n]``.
        asked: what is wanted.
    """
    if head is not None:
        return fused_linear_token_stats(
            source,
            head.weight,
            labels,
            asked.regions,
            bias=head.bias,
            temperature=asked.temperature,
            memory=asked.memory,
        )
    if asked.fused:
        outputs = token_stats(source, labels, asked.regions, asked.temperature)
    else:
        outputs = _reference(_scaled(source, asked.temperature), labels, asked.regions)
    if not asked.show_logits:
        return outputs
    return replace(outputs, logits=_scaled(source, asked.temperature))


def head_loss(
    source: Tensor,
    head: nn.Linear | None,
    labels: Tensor,
    asked: HeadOptions,
    losses: TokenLosses,
) -> LossSum:
    """Sum of the losses ``[..., n]`` that ``losses`` makes of some tokens' outputs.

    Arguments as of :func:`head_outputs`; ``losses`` gets the tokens chunk by chunk.
    """
    if head is not None:
        return fused_linear_loss(
            source,
            head.weight,
            labels,
            losses,
            asked.regions,
            bias=head.bias,
            temperature=asked.temperature,
            memory=asked.memory,
        )
    outputs = head_outputs(source, head, labels, asked)
    values = losses(slice(None), outputs)
    return LossSum(values.sum(), values.detach(), outputs.logprobs.detach())


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def _reference(logits: Tensor, labels: Tensor, regions: Sequence[Region]) -> PolicyOutputs:
    def stats(region: Region) -> EntropyStats:
        if region.whole:
            full = full_entropy(logits)
            none = torch.zeros_like(full)
            size = torch.full_like(labels, logits.shape[-1])
            return EntropyStats(full.detach(), full, full, none + 1.0, size, none.detach())
        kind = asdict(region)
        found = entropy_stats(logits, **kind)
        inside = trust_region_entropy(logits, **kind, rescale=False)
        return found._replace(region=inside, scaled=inside * found.scale)

    return PolicyOutputs(label_logprobs(logits, labels), {r: stats(r) for r in regions})


@torch.no_grad()
def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The layer from last hidden states to logits, where it is all that stands between them.

    Tried out, with hidden states so large that a soft cap shows: the model's logits
    must be the layer's output, and its input the trunk's.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    trunk = trunk_of(model)
    seen: dict[str, Tensor] = {}

    def enlarge(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen["input"] = args[0]
        return (torch.full_like(args[0], 1000.0),)

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["output"] = output

    hooks = [head.register_forward_pre_hook(enlarge), head.register_forward_hook(keep)]
    # More than one id: that of padding may have hidden states of 0.
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
    same = torch.equal(logits.float(), seen["output"].float())
    reads = hidden.shape == seen["input"].shape and torch.allclose(hidden, seen["input"])
    return head if same and reads else None


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of ``labels`` ``[...]`` under ``logits`` ``[..., V]``, float32 ``[...]``."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    chosen = wide.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return chosen - wide.logsumexp(-1)
