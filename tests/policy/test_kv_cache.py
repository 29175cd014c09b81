"""Tests of tre_lightning.policy.kv_cache."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer

from tre_lightning.policy.kv_cache import GrowingLayer, growing_cache

SHAPE = (3, 2, 4)  # rows, heads, width


def states(rows: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    numbers = torch.manual_seed(seed)
    shape = (rows, SHAPE[1], tokens, SHAPE[2])
    return torch.randn(shape, generator=numbers), torch.randn(shape, generator=numbers)


def after(layer: DynamicLayer, tokens: Sequence[int], rows: int = SHAPE[0]) -> DynamicLayer:
    """The layer with so many tokens added at each update."""
    for step, count in enumerate(tokens):
        layer.update(*states(rows, count, step))
    return layer


def assert_same(left: Any, right: Any) -> None:
    assert left.get_seq_length() == right.get_seq_length()
    assert left.get_mask_sizes(1) == right.get_mask_sizes(1)
    assert torch.equal(left.keys, right.keys) and torch.equal(left.values, right.values)


@pytest.mark.parametrize("tokens", [[5], [5, 1, 1], [1] * 70, [63, 1, 1], [64, 1], [3, 200, 1]])
def test_it_holds_what_the_plain_layer_holds(tokens: list[int]) -> None:
    ours, plain = after(GrowingLayer(), tokens), after(DynamicLayer(), tokens)
    assert_same(ours, plain)
    for step in (100, 101):
        new = states(SHAPE[0], 1, step)
        for mine, theirs in zip(ours.update(*new), plain.update(*new), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("before", [[5], [5, 1, 1], [63, 1]])
def test_rows_are_kept_repeated_and_reordered(before: list[int]) -> None:
    rows = torch.tensor([2, 0, 0, 2])
    layers = [after(kind(), before) for kind in (GrowingLayer, DynamicLayer)]
    for layer in layers:
        layer.reorder_cache(rows)  # type: ignore[arg-type]
        after(layer, [1, 1], rows=4)
    assert_same(*layers)


def test_a_copy_grows_by_itself() -> None:
    ours, plain = after(GrowingLayer(), [5, 1]), after(DynamicLayer(), [5, 1])
    other = copy.deepcopy(ours)
    other.update(*states(SHAPE[0], 1, 100))
    for layer in (ours, plain):
        layer.update(*states(SHAPE[0], 1, 101))
    assert_same(ours, plain)
    assert not torch.equal(other.keys, ours.keys)


def test_most_updates_copy_nothing() -> None:
    layer = after(GrowingLayer(), [5, 1])
    places = [after(layer, [1]).keys.data_ptr() for _ in range(200)]
    assert len(set(places)) <= 5


def test_layers_of_other_kinds_stay_as_they_are() -> None:
    config = AutoConfig.for_model(
        "qwen2",
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=4,
    )
    sliding, full = growing_cache(config).layers
    assert type(full) is GrowingLayer
    assert type(sliding) is type(DynamicCache(config=config).layers[0])
