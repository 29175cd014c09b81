"""Tests of tre_lightning.methods.repo."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import batches
from tre_lightning.batches import TrainingBatch
from tre_lightning.methods import REPO
from tre_lightning.methods.hooks import shaped


def batch(advantages: batches.Rows, logprobs: batches.Rows) -> TrainingBatch:
    return batches.training_batch(advantages, old_logprobs=logprobs)


def made_of(method: REPO, made: TrainingBatch) -> list[float]:
    kept: list[float] = shaped(made, [method]).advantages[made.response_mask].tolist()
    return kept


def follow(method: REPO, *means: float) -> list[float]:
    """zeta at rollouts of these mean entropies."""
    seen = []
    for mean in means:
        rows = [[mean + 0.5, mean - 0.25], [mean - 0.25]]
        ones = [[1.0] * len(row) for row in rows]
        method.adapt(batches.training_batch(ones, observed={"repo": rows}))
        seen.append(method.zeta)
    return seen


def test_advantages_by_hand() -> None:
    made = batch([[2.0, 2.0, -2.0], [-2.0, 0.0]], [[-1.0, -6.0, -1.0], [-6.0, -3.0]])
    method = REPO(zeta=0.05)
    expected = [2.0 * 1.05, 2.0 * 1.3, -2.0 * 0.95, -2.0 * 0.7, 0.0]
    assert made_of(method, made) == pytest.approx(expected)
    method.zeta = -0.05
    expected = [2.0 * 0.95, 2.0 * 0.7, -2.0 * 1.05, -2.0 * 1.3, 0.0]
    assert made_of(method, made) == pytest.approx(expected)


@given(
    advantage=st.floats(-3.0, 3.0, width=32),
    logprob=st.floats(-60.0, 0.0, width=32),
    zeta=st.floats(-0.05, 0.05),
)
def test_no_advantage_changes_its_sign(advantage: float, logprob: float, zeta: float) -> None:
    method = REPO()
    method.zeta = zeta
    (after,) = made_of(method, batch([[advantage]], [[logprob]]))
    assert advantage * after >= 0.0
    # A positive zeta lets rare tokens gain, a negative one those that are common.
    assert after >= advantage - 1e-6 if zeta >= 0.0 else after <= advantage + 1e-6


def test_advantages_are_held_at_0() -> None:
    assert made_of(REPO(zeta=0.05), batch([[-1.0]], [[-30.0]])) == [0.0]


def test_zeta_follows_the_first_rollouts_entropy() -> None:
    method = REPO(zeta=0.01, zeta_min=0.004, zeta_max=0.03)
    # The first sets the target; below it twice as much, held at the largest; at it unchanged.
    assert follow(method, 1.0, 0.5, 0.5, 1.0) == pytest.approx([0.01, 0.02, 0.03, 0.03])
    # Above it half as much, down to the smallest, and then of the other sign, which grows.
    assert follow(method, 2.0, 2.0, 2.0, 2.0) == pytest.approx([0.015, 0.0075, -0.004, -0.008])
    # Back below: half as much of the wrong sign, then the right one.
    assert follow(method, 0.5, 0.5, 0.5) == pytest.approx([-0.004, 0.004, 0.008])
    assert method.logged() == {"zeta": method.zeta, "entropy": pytest.approx(0.5), "target": 1.0}


def test_a_target_may_be_given_and_zeta_held() -> None:
    assert follow(REPO(zeta=0.01, target=0.5), 1.0, 0.25) == pytest.approx([0.005, 0.01])
    assert follow(REPO(zeta=0.01, adaptive=False), 1.0, 0.5, 2.0) == [0.01] * 3
    assert follow(REPO(zeta=0.0), 1.0, 0.5, 2.0) == [0.0] * 3


def test_a_rollout_without_tokens_changes_nothing() -> None:
    method = REPO()
    made = batches.training_batch([[1.0]], observed={"repo": [[2.0]]})
    method.adapt(batches.without(made))
    assert method.target is None and method.logged() == {}


def test_tokens_that_do_not_count_keep_their_advantage() -> None:
    made = batch([[1.0, 1.0], [1.0]], [[-1.0, -1.0], [-1.0]])
    after = shaped(batches.without(made, 0), [REPO(zeta=0.05)]).advantages
    assert after[0].tolist() == [1.0, 1.0]
    assert after[1].tolist() == [pytest.approx(1.05), pytest.approx(math.nan, nan_ok=True)]


def test_its_state_goes_on() -> None:
    method, after = REPO(zeta=0.01), REPO(zeta=0.01)
    follow(method, 1.0, 0.5)
    after.load_state_dict(pickle.loads(pickle.dumps(method.state_dict())))
    assert follow(after, 0.5) == follow(method, 0.5) == pytest.approx([0.04])
    assert torch.equal(torch.tensor(after.zeta), torch.tensor(method.zeta))
