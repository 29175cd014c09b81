"""Tests of tre_lightning.methods.entrocraft."""

import pytest

import batches
from tre_lightning.methods import Entrocraft, LinearSchedule

KEY = ("minibatches", 0)
ADVANTAGES = [[2.0, -1.0, 0.0], [0.5, -3.0]]


def weights(method: Entrocraft, mean: float, advantages: batches.Rows = ADVANTAGES) -> list[float]:
    """Of the tokens, after a rollout of this mean entropy."""
    entropies = [[mean] * len(row) for row in advantages]
    made = batches.training_batch(advantages, observed={"entrocraft": entropies})
    method.adapt(made)
    kept: list[float] = method.policy_weights(made, KEY)[made.response_mask].tolist()
    return kept


def test_by_hand() -> None:
    method = Entrocraft(low=0.5, high=1.0)
    for within in (0.5, 0.75, 1.0):
        assert weights(method, within) == [1.0] * 5
    # The mean is over those kept: 5 tokens, of which 3 stay.
    scale = pytest.approx(5 / 3)
    assert weights(method, 1.25) == [scale, 0.0, scale, scale, 0.0]
    assert weights(method, 0.25) == [0.0, scale, scale, 0.0, scale]


def test_where_everything_is_rejected_nothing_trains() -> None:
    assert weights(Entrocraft(low=0.5, high=1.0), 2.0, [[-1.0, -2.0]]) == [0.0, 0.0]


def test_the_band_follows_its_schedule() -> None:
    method = Entrocraft(LinearSchedule(1.0, 0.0, 2), LinearSchedule(2.0, 1.0, 2))
    sides = []
    for method.iteration in range(4):
        weights(method, 0.75)
        sides.append(method.side)
    assert sides == [-1, 0, 0, 0]
    for method.iteration in range(4):
        weights(method, 1.75)
        sides.append(method.side)
    assert sides[4:] == [0, 1, 1, 1]
    assert method.logged() == {"entropy": 1.75, "low": 0.0, "high": 1.0}


def test_uncounted_tokens_are_not_kept() -> None:
    method = Entrocraft(low=0.5, high=1.0)
    made = batches.training_batch(ADVANTAGES, observed={"entrocraft": [[2.0] * 3, [2.0] * 2]})
    made = batches.without(made, 0)
    method.adapt(made)
    assert method.policy_weights(made, KEY).tolist() == [[0.0] * 3, [2.0, 0.0, 0.0]]
