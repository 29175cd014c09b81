"""Tests of the adaptive entropy control: its controller by hand."""

import pickle

import pytest
import torch

import batches
from tre_lightning.batches import TrainingBatch
from tre_lightning.methods import AdaptiveEntropy

P = [0.5, 0.3, 0.1, 0.1]
NONE = batches.tokens(0)


def rollout(*entropies: list[float]) -> TrainingBatch:
    rows = [[1.0] * len(row) for row in entropies]
    return batches.training_batch(rows, observed={"adaptive_entropy": entropies})


def follow(term: AdaptiveEntropy, *means: float) -> list[float]:
    """The coefficients of rollouts of these mean entropies."""
    seen = []
    for mean in means:
        term.adapt(rollout([mean + 4.0, mean - 2.0], [mean - 2.0]))
        seen.append(term.coef_at(0))
    return seen


def test_entropy_is_over_the_whole_vocabulary() -> None:
    term = AdaptiveEntropy()
    out = batches.outputs(term, torch.tensor([P]).log())
    expected = torch.tensor([batches.entropy(*P)])
    torch.testing.assert_close(term.observe(out, None), expected)
    torch.testing.assert_close(term.per_token(out, NONE), -expected)


def test_coefficient_by_hand() -> None:
    term = AdaptiveEntropy(target=0.25, delta=0.005)
    assert term.coef_at(0) == 0.0 and term.logged() == {}
    means = (0.125, 0.1875, 0.5, 0.25, 0.125, 0.5, 0.5, 0.5, 0.125, 0.125)
    assert follow(term, *means) == pytest.approx(
        [
            0.0,  # c_0; then 0.005
            0.005,  # then 0.01
            0.0,  # above the target: off; then 0.005
            0.005,  # at the target: on, and c stays
            0.005,  # then 0.01
            0.0,  # then 0.005
            0.0,  # then 0
            0.0,  # held at 0
            0.0,  # then 0.005
            0.005,
        ]
    )
    assert term.logged() == {"entropy": pytest.approx(0.125), "next_coef": pytest.approx(0.01)}


def test_a_lower_bound_holds_the_coefficient() -> None:
    term = AdaptiveEntropy(coef=0.004, target=0.25, delta=0.002, min_coef=0.003)
    # Above the target it is off all the same; below it acts at once with the bound.
    means = (0.5, 0.5, 0.5, 0.125, 0.125)
    assert follow(term, *means) == pytest.approx([0.0, 0.0, 0.0, 0.003, 0.005])


def test_a_limit_holds_the_coefficient() -> None:
    term = AdaptiveEntropy(coef=0.003, target=0.25, delta=0.002, max_coef=0.006)
    found = follow(term, 0.125, 0.125, 0.125, 0.125, 0.5, 0.125)
    assert found == pytest.approx([0.003, 0.005, 0.006, 0.006, 0.0, 0.004])


def test_off_stays_off() -> None:
    assert follow(AdaptiveEntropy(coef=0.0, delta=0.0), 0.0, 0.1, 0.1) == [0.0] * 3
    assert follow(AdaptiveEntropy(max_coef=0.0), 0.0, 0.1, 0.1) == [0.0] * 3


def test_a_rollout_without_a_counted_token_changes_nothing() -> None:
    term = AdaptiveEntropy(coef=0.01)
    term.adapt(batches.without(rollout([0.0])))
    assert term.state_dict() == {"coef": 0.01} and term.logged() == {}


def test_state_keeps_the_coefficient() -> None:
    term = AdaptiveEntropy(target=0.25)
    follow(term, 0.125, 0.125)
    resumed = AdaptiveEntropy(target=0.25)
    resumed.load_state_dict(term.state_dict())
    copied = pickle.loads(pickle.dumps(term))
    for each in (term, resumed, copied):
        assert follow(each, 0.125, 0.5, 0.125) == pytest.approx([0.01, 0.0, 0.01])


def test_defaults_are_the_papers() -> None:
    term = AdaptiveEntropy()
    assert (term.coef, term.target, term.delta, term.max_coef) == (0.0, 0.2, 0.005, None)
