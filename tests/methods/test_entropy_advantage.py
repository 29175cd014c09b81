"""Tests of tre_lightning.methods.entropy_advantage."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import batches
from tre_lightning.batches import TrainingBatch
from tre_lightning.entropy import EntropyStats
from tre_lightning.methods import EntropyAdvantage, PolicyOutputs
from tre_lightning.methods.hooks import shaped
from tre_lightning.ops import Region

NAME = "entropy_advantage"


def batch(advantages: batches.Rows, entropies: batches.Rows) -> TrainingBatch:
    return batches.training_batch(advantages, None, {NAME: entropies})


def made_of(method: EntropyAdvantage, made: TrainingBatch) -> list[float]:
    kept: list[float] = shaped(made, [method]).advantages[made.response_mask].tolist()
    return kept


def test_by_hand() -> None:
    made = batch([[1.0, -1.0, 0.1], [0.0]], [[2.0, 2.0, 2.0], [2.0]])
    expected = [1.0 + 0.2, -1.0 + 0.2, 0.1 + 0.05, 0.0]  # the third is held at |A| / 2
    assert made_of(EntropyAdvantage(), made) == pytest.approx(expected)
    expected = [1.0 + 0.25, -1.0 + 0.25, 0.1 + 0.025, 0.0]
    assert made_of(EntropyAdvantage(alpha=0.4, kappa=4.0), made) == pytest.approx(expected)
    assert made.advantages[made.response_mask].tolist() == pytest.approx([1.0, -1.0, 0.1, 0.0])


@given(
    advantage=st.floats(-3.0, 3.0, width=32),
    entropy=st.floats(0.0, 12.0, width=32),
    alpha=st.floats(0.0, 10.0),
    kappa=st.floats(1.01, 10.0),
)
def test_never_lower_and_never_of_the_other_sign(
    advantage: float, entropy: float, alpha: float, kappa: float
) -> None:
    (after,) = made_of(EntropyAdvantage(alpha, kappa), batch([[advantage]], [[entropy]]))
    assert advantage <= after
    assert advantage * after >= 0.0


def test_tokens_that_do_not_count_keep_their_advantage() -> None:
    made = batch([[1.0, 1.0], [1.0]], [[1.0, 1.0], [1.0]])
    after = shaped(batches.without(made, 0), [EntropyAdvantage()]).advantages
    assert after[0].tolist() == [1.0, 1.0]
    assert after[1].tolist() == [pytest.approx(1.1), pytest.approx(math.nan, nan_ok=True)]


def test_a_batch_without_tokens() -> None:
    made = batch([[1.0], [2.0]], [[1.0], [1.0]])
    empty = batches.without(made)
    assert shaped(empty, [EntropyAdvantage()]).advantages.tolist() == [[1.0], [2.0]]


def test_the_entropy_of_the_whole_vocabulary_is_observed() -> None:
    method = EntropyAdvantage(name="mine")
    assert method.observed_regions == (Region(),)
    full, other = torch.tensor([0.3, 0.7]), torch.zeros(2)
    stats = EntropyStats(full, other, other, other, other, other)
    assert method.observe(PolicyOutputs(other, {Region(): stats}), None) is full
    own = batches.training_batch([[1.0]], None, {"mine": [[1.0]], NAME: [[5.0]]})
    assert made_of(method, own) == pytest.approx([1.1])


def test_it_pickles() -> None:
    method = EntropyAdvantage(0.3, 3.0)
    copied = pickle.loads(pickle.dumps(method))
    made = batch([[1.0, 0.1]], [[1.0, 2.0]])
    assert made_of(copied, made) == made_of(method, made)
    assert copied.state_key == method.state_key
