"""A key-value cache with room to grow.

transformers' own copies all keys and values at every token, which is quadratic in the length of a
response; this one copies them once in ``_STEP`` tokens. Only layers that attend to everything are
replaced: sliding windows and states of other kinds keep a fixed size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

_STEP = 64  # tokens


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model of this configuration."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):
    """Keys and values ``[R, H, C, D]`` of a layer, stored in buffers with room for more tokens."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rooms: list[Tensor] = []  # of keys and of values, from the second update on

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, ``[R, H, c, D]``, and return all of them."""
        start = self.get_seq_length()
        if start == 0 or self.keys is None or self.values is None:
            return super().update(key_states, value_states, *args, **kwargs)
        end = start + key_states.shape[-2]
        if not self._rooms or end > self._rooms[0].shape[-2]:
            self._rooms = [_with_room(held, end) for held in (self.keys, self.values)]
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., start:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep these rows in this order, ``[R']`` int64."""
        if not self._rooms:
            return super().reorder_cache(beam_idx)
        length = self.get_seq_length()
        self._rooms = [room.index_select(0, beam_idx.to(room.device)) for room in self._rooms]
        self.keys, self.values = (room[..., :length, :] for room in self._rooms)


def _with_room(held: Tensor, length: int) -> Tensor:
    """A copy ``[R, H, C', D]`` for ``length`` tokens and some more."""
    *outer, used, width = held.shape
    room = torch.empty(
        *outer, (length // _STEP + 1) * _STEP, width, dtype=held.dtype, device=held.device
    )
    room[..., :used, :] = held
    return room
