"""Tests of tre_lightning.methods.forking_tokens and of the selection that it fractions."""

import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import batches
from tre_lightning.batches import TrainingBatch
from tre_lightning.entropy import EntropyStats
from tre_lightning.methods import ForkingTokens, Method, PolicyOutputs
from tre_lightning.methods.hooks import POLICY, weighed
from tre_lightning.methods.selection import fraction_of, top
from tre_lightning.ops import Region
from tre_lightning.training.losses import masked_sum

KEY = ("minibatches", 0)
ENTROPIES = [[0.1, 2.0, 0.3], [1.5], [0.2, 0.0, 0.9, 1.0, 0.4, 0.8]]  # 10 tokens


def batch(entropies: Sequence[Sequence[float]], name: str = "forking_tokens") -> TrainingBatch:
    return batches.training_batch([[1.0] * len(row) for row in entropies], None, {name: entropies})


def weights(method: Method, minibatch: TrainingBatch) -> Tensor:
    made = method.policy_weights(minibatch, KEY)
    assert made is not None and made.shape == minibatch.response_mask.shape
    assert (made[~minibatch.response_mask] == 0.0).all()  # not NaN either
    return made


def rows(values: Tensor, minibatch: TrainingBatch) -> list[list[float]]:
    """Of each response, without the padding."""
    pairs = zip(values, minibatch.response_mask, strict=True)
    return [row[counted].tolist() for row, counted in pairs]


# --- selection ---


@pytest.mark.parametrize(
    ("count", "fraction", "down", "up"),
    [
        (10, 0.2, 2, 2),
        (11, 0.2, 2, 3),
        (100, 0.07, 7, 7),  # 0.07 * 100 = 7.000000000000001
        (100, 0.29, 29, 29),  # 0.29 * 100 = 28.999999999999996
        (4, 0.0002, 1, 1),
        (12_000, 0.0002, 2, 3),
        (7, 1.0, 7, 7),
        (0, 0.5, 0, 0),
    ],
)
def test_share_of_by_hand(count: int, fraction: float, down: int, up: int) -> None:
    assert fraction_of(count, fraction) == down
    assert fraction_of(count, fraction, up=True) == up


def test_top_takes_the_earlier_of_equals() -> None:
    mask = torch.tensor([[False, True, True], [True, False, True]])
    values = torch.tensor([[math.nan, 1.0, 1.0], [1.0, math.inf, 2.0]])
    chosen = [top(values, mask, count).int().tolist() for count in range(6)]
    assert chosen[0] == [[0, 0, 0], [0, 0, 0]]
    assert chosen[1] == [[0, 0, 0], [0, 0, 1]]
    assert chosen[2] == [[0, 1, 0], [0, 0, 1]]
    assert chosen[3] == [[0, 1, 1], [0, 0, 1]]
    assert chosen[4] == chosen[5] == mask.int().tolist()


def test_top_takes_the_earlier_of_many_equals() -> None:
    # A sort that need not be stable mixes them up only where they are many.
    values = torch.randint(3, (100, 200), generator=torch.Generator().manual_seed(0)).float()
    twos, ones = values == 2, values == 1
    chosen = top(values, torch.ones_like(twos), int(twos.sum()) + 50)
    first_ones = ones & (ones.flatten().cumsum(0).view_as(values) <= 50)
    assert torch.equal(chosen, twos | first_ones)


# --- weights ---


def test_the_largest_entropies_of_the_whole_minibatch_count() -> None:
    minibatch = batch(ENTROPIES)
    made = weights(ForkingTokens(), minibatch)
    assert rows(made, minibatch) == [[0, 1, 0], [1], [0, 0, 0, 0, 0, 0]]
    made = weights(ForkingTokens(fraction=0.31), minibatch)  # 3.1 is rounded up
    assert rows(made, minibatch) == [[0, 1, 0], [1], [0, 0, 1, 1, 0, 0]]


@given(
    entropies=st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=6), min_size=1
    ),
    fraction=st.floats(0.01, 1.0),
)
def test_exactly_the_share_is_selected(entropies: list[list[float]], fraction: float) -> None:
    minibatch = batch(entropies)
    mask, observed = minibatch.response_mask, minibatch.observed["forking_tokens"]
    made = weights(ForkingTokens(fraction), minibatch)
    count = int(mask.sum())
    assert abs(made.sum().item() - max(1.0, fraction * count)) < 1.0
    assert set(made.unique().tolist()) <= {0.0, 1.0}
    out = observed[mask & (made == 0)]
    assert out.numel() == 0 or out.max() <= observed[made == 1].min()


def test_unscored_responses_are_not_selected() -> None:
    minibatch = batch(ENTROPIES)
    # The 2.0 of the first response was the largest.
    made = weights(ForkingTokens(fraction=2 / 7), batches.without(minibatch, 0))
    assert made[1].tolist() == [1, 0, 0, 0, 0, 0]
    assert made[2].tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("average_over", ["all", "selected"])
def test_a_minibatch_without_tokens(average_over: Any) -> None:
    minibatch = batch(ENTROPIES)
    empty = batches.without(minibatch)
    assert weights(ForkingTokens(average_over=average_over), empty).sum() == 0.0


def test_the_divisor() -> None:
    minibatch = batch(ENTROPIES)
    losses = batches.padded([[3.0, 8.0, 3.0], [4.0], [3.0] * 6])
    mask = minibatch.response_mask

    def loss(method: Method) -> float:  # as the module reduces it
        made = weighed(minibatch, [method], KEY).weights[POLICY]
        return (masked_sum(losses * made, mask) / mask.sum()).item()

    assert loss(ForkingTokens()) == pytest.approx((8.0 + 4.0) / 10)
    assert loss(ForkingTokens(average_over="selected")) == pytest.approx((8.0 + 4.0) / 2)


def test_the_entropy_of_the_whole_vocabulary_is_observed() -> None:
    method = ForkingTokens(name="mine")
    assert method.observed_regions == (Region(),)
    full, other = torch.tensor([0.3, 0.7]), torch.zeros(2)
    stats = EntropyStats(full, other, other, other, other, other)
    outputs = PolicyOutputs(other, {Region(): stats})
    assert method.observe(outputs, None) is full
    made = weights(method, batch(ENTROPIES, "mine"))  # it finds its own
    assert made.sum() == 2.0


def test_it_pickles() -> None:
    method = ForkingTokens(0.3, "selected", name="mine")
    copied = pickle.loads(pickle.dumps(method))
    minibatch = batch(ENTROPIES, "mine")
    assert torch.equal(weights(copied, minibatch), weights(method, minibatch))
    assert copied.state_key == method.state_key
