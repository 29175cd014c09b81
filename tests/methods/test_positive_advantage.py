"""Tests of tre_lightning.methods.positive_advantage."""

import pytest

import batches
from tre_lightning.methods import LinearSchedule, PositiveAdvantageReweighting

KEY = ("minibatches", 0)
MADE = batches.training_batch([[2.0, -1.0, 0.0], [0.5]])


def weights(method: PositiveAdvantageReweighting) -> list[float]:
    made = method.policy_weights(MADE, KEY)
    assert made is not None
    kept: list[float] = made[MADE.response_mask].tolist()
    return kept


def follow(method: PositiveAdvantageReweighting, *means: float) -> list[float]:
    """The weight of positive advantages after rollouts of these mean entropies."""
    seen = []
    for iteration, mean in enumerate(means):
        method.iteration = iteration
        rows = [[mean + 0.5, mean - 0.25], [mean - 0.25]]
        ones = [[1.0] * len(row) for row in rows]
        method.adapt(batches.training_batch(ones, observed={"positive_advantage": rows}))
        seen.append(weights(method)[0])
    return seen


def test_positive_advantages_alone_are_weighed() -> None:
    method = PositiveAdvantageReweighting(weight=0.25, target=None)
    assert weights(method) == [0.25, 1.0, 1.0, 0.25]


def test_the_weight_follows_the_entropy() -> None:
    method = PositiveAdvantageReweighting(weight=0.5, target=1.0, step=0.25)
    # Each rollout moves the weight of the next one.
    assert follow(method, 0.5, 0.5, 0.5, 1.0) == pytest.approx([0.5, 0.25, 0.0, 0.0])
    assert follow(method, *[2.0] * 6) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    assert method.logged() == {"weight": 1.0, "entropy": pytest.approx(2.0)}


def test_a_schedule_over_iterations() -> None:
    method = PositiveAdvantageReweighting(LinearSchedule(0.0, 1.0, 4), target=None)
    assert follow(method, *[1.0] * 6) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])


def test_off_it_weighs_nothing() -> None:
    method = PositiveAdvantageReweighting(weight=1.0, target=None)
    assert method.policy_weights(MADE, KEY) is None


def test_its_state_goes_on() -> None:
    method = PositiveAdvantageReweighting(weight=0.5, target=1.0, step=0.25)
    after = PositiveAdvantageReweighting(weight=0.5, target=1.0, step=0.25)
    follow(method, 0.5)
    after.load_state_dict(method.state_dict())
    assert follow(after, 0.5) == follow(method, 0.5) == [0.25]
