"""Rows side by side in one sequence: no padding, and the prompt of several responses only once.

What a transformer does to each token by itself (projections, experts, norms) then runs over real
tokens alone. Only where tokens look at each other, in attention, they are put back into rows, a
shared prompt into every row of its responses. A mask of the model's own making (causal, sliding
windows, chunks) is made for these rows.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_PLAIN, _PACKED = "sdpa", "tre_lightning_packed"  # names of attention functions
_ALIKE = 0.7  # rows that are at least so much of the longest one are padded to it in attention


@dataclass(frozen=True)
class Packed:
    """B rows as one sequence of N tokens.

    A token is left out where no output of its row is wanted from there on.
    """

    ids: Tensor  # [N] int64
    positions: Tensor  # [N] int64, in each token's row
    blocks: tuple[Tensor, ...]  # [b, c] int64 each: the tokens' numbers in b rows of about c tokens
    homes: Tensor  # [N] int64, a place of each token in the blocks, one row after another
    asked: Tensor  # [n] int64, numbers of the tokens whose outputs are wanted, in reading order

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, asked: Tensor, prompt: int) -> Self:
        """Pack rows.

        Args:
            ids: ``[B, C]`` rows.
            mask: ``[B, C]`` bool, True = a real token.
            asked: ``[B, C]`` bool, the tokens whose outputs are wanted.
            prompt: the first columns; where they are equal in some rows, their tokens are one.
        """
        used = mask & (asked.long().flip(1).cumsum(1).flip(1) > 0)
        _, group = ids[:, :prompt].where(used[:, :prompt], -1).unique(dim=0, return_inverse=True)
        row = torch.arange(len(ids), device=ids.device)
        first = torch.full_like(row, len(row)).scatter_reduce(0, group, row, "amin")[group]
        stored = used.clone()
        stored[:, :prompt] &= (first == row).unsqueeze(1)
        number = stored.flatten().cumsum(0).view_as(ids) - 1
        number[:, :prompt] = number[first, :prompt]
        # From the left: a token's column is its position. What follows a row is anything.
        position = mask.long().cumsum(1) - 1
        rows = number.gather(1, used.long().argsort(dim=1, descending=True, stable=True))
        lengths, blocks, start, starts = used.sum(1), [], 0, torch.zeros_like(row)
        for part, width in _of_one_length(lengths):
            starts[part] = start + width * torch.arange(len(part), device=row.device)
            blocks.append(rows[part, :width].clamp(min=0))
            start += len(part) * width
        homes = starts.unsqueeze(1) + position
        return cls(ids[stored], position[stored], tuple(blocks), homes[stored], number[asked])

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.blocks[0].shape[1]

    @property
    def inputs(self) -> dict[str, Any]:
        """Those of a forward pass, in :meth:`attended`."""
        ids = self.ids.unsqueeze(0)
        # Without a mask, transformers looks for rows in the positions.
        whole = torch.ones_like(ids)
        position_ids = self.positions.unsqueeze(0)
        return {
            "input_ids": ids,
            "attention_mask": whole,
            "position_ids": position_ids,
            "use_cache": False,
        }

    def attended(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context in which the model's attention puts the tokens into rows."""
        return _attended(self, _configs(model))


def _of_one_length(lengths: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows of about one length, and their longest: what attention pads to each other."""
    order = lengths.argsort(descending=True)
    ordered = lengths[order].tolist()
    start = 0
    while start < len(ordered) and ordered[start]:
        width, end = ordered[start], start
        while end < len(ordered) and ordered[end] >= _ALIKE * width:
            end += 1
        yield order[start:end], width
        start = end


def can_pack(model: nn.Module) -> bool:
    """Whether the model's attention is one that may be replaced; a trial must say if it works."""
    configs = _configs(model)
    return bool(configs) and all(c._attn_implementation == _PLAIN for c in configs)


def recomputing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The ``context_fn`` of gradient checkpointing: it computes again as in the forward pass."""
    now = _now.get()
    return nullcontext(), nullcontext() if now is None else _attended(*now)


_Now = tuple[Packed, list[PreTrainedConfig]]
_now: ContextVar[_Now | None] = ContextVar("packed", default=None)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    found = (getattr(part, "config", None) for part in model.modules())
    return list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())


@contextmanager
def _attended(packed: Packed, configs: list[PreTrainedConfig]) -> Iterator[None]:
    before = _now.set((packed, configs))
    try:
        _set(configs, _PACKED)
        yield
    finally:
        _set(configs, _PLAIN)
        _now.reset(before)


def _set(configs: list[PreTrainedConfig], name: str) -> None:
    for config in configs:
        config._attn_implementation = name


def _current() -> Packed:
    now = _now.get()
    assert now is not None
    return now[0]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """Attention ``[1, N, H, D]`` of queries, keys and values ``[1, h, N, D]``, in rows."""
    packed = _current()
    if mask is not None and mask.shape[-2:] != (packed.longest, packed.longest):
        raise ValueError("the model makes masks in a way of its own")
    found = []
    for slots in packed.blocks:
        width = slots.shape[1]
        q, k, v = (_in_rows(states, slots) for states in (query, key, value))
        of_rows = None if mask is None else mask[..., :width, :width]
        found.append(sdpa_attention_forward(module, q, k, v, of_rows, **rest)[0].flatten(0, 1))
    return torch.cat(found).index_select(0, packed.homes).unsqueeze(0), None


def _in_rows(states: Tensor, slots: Tensor) -> Tensor:
    """Of N tokens ``[1, h, N, D]``, those in some rows, ``[b, h, c, D]``."""
    tokens = states.squeeze(0).transpose(0, 1)
    rows: Tensor = tokens.index_select(0, slots.flatten()).unflatten(0, slots.shape)
    return rows.transpose(1, 2)


def _row_mask(**options: Any) -> Tensor | None:
    """The mask ``[1, 1, C, C]`` that the model asks for, of the longest row: it serves all."""
    width = _current().longest
    changed = {"batch_size": 1, "q_length": width, "kv_length": width, "attention_mask": None}
    return sdpa_mask(**{**options, **changed})


AttentionInterface.register(_PACKED, _attend)
AttentionMaskInterface.register(_PACKED, _row_mask)
