"""Tests of the adaptive entropy control: its controller by hand, and whole runs."""

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import batches
import method_runs
from tre_lightning.batches import TrainingBatch
from tre_lightning.methods import AdaptiveEntropy

P = [0.5, 0.3, 0.1, 0.1]
# The entropy of the tiny run falls through this after the first iteration.
OPTIONS = {"coef": 0.01, "target": 3.83, "delta": 0.005}
ON = method_runs.spec("AdaptiveEntropy", **OPTIONS)
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
    out = method_runs.outputs(term, torch.tensor([P]).log())
    expected = torch.tensor([method_runs.entropy(*P)])
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


def test_a_limit_holds_the_coefficient() -> None:
    term = AdaptiveEntropy(coef=0.003, target=0.25, delta=0.002, max_coef=0.006)
    found = follow(term, 0.125, 0.125, 0.125, 0.125, 0.5, 0.125)
    assert found == pytest.approx([0.003, 0.005, 0.006, 0.006, 0.0, 0.004])


def test_off_stays_off() -> None:
    assert follow(AdaptiveEntropy(coef=0.0, delta=0.0), 0.0, 0.1, 0.1) == [0.0] * 3
    assert follow(AdaptiveEntropy(max_coef=0.0), 0.0, 0.1, 0.1) == [0.0] * 3


def test_a_rollout_without_a_counted_token_changes_nothing() -> None:
    term = AdaptiveEntropy(coef=0.01)
    empty = rollout([0.0])
    term.adapt(replace(empty, response_mask=torch.zeros_like(empty.response_mask)))
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coef": -1.0}, r"\[adaptive_entropy\]\.coef=-1.0"),
        ({"target": 0.0}, r"target=0.0 "),
        ({"delta": -0.1}, r"delta=-0.1 "),
        ({"delta": math.nan}, r"delta=nan "),
        ({"coef": 0.2, "max_coef": 0.1}, r"max_coef=0.1 .*coef=0.2"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveEntropy(**options)


# --- whole runs ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adaptive_entropy")
    return method_runs.run(folder / "run", ON, **method_runs.KEEP)


def test_a_run_starts_the_bonus_below_the_target(whole: Path) -> None:
    entropies = method_runs.logged(whole, "loss/adaptive_entropy_entropy")
    assert entropies == pytest.approx(method_runs.logged(whole, "entropy/full"), rel=1e-5)
    assert entropies[0] > 3.83 > max(entropies[1:])
    found = method_runs.logged(whole, "loss/adaptive_entropy_coef")
    assert found == pytest.approx([0.0, 0.005, 0.01, 0.015])
    following = method_runs.logged(whole, "loss/adaptive_entropy_next_coef")
    assert following == pytest.approx([0.005, 0.01, 0.015, 0.02])


def test_resumed(whole: Path, tmp_path: Path) -> None:
    # After 2 iterations, one above the target and one below, c is back where it started.
    method_runs.assert_resumes(whole, tmp_path, ON, iteration=3)


def test_off_is_ppo(whole: Path, tmp_path: Path) -> None:
    off = method_runs.spec("AdaptiveEntropy", **{**OPTIONS, "coef": 0.0, "delta": 0.0})
    method_runs.assert_off(method_runs.run(tmp_path / "off", off), whole)


def test_beside_tre(tmp_path: Path) -> None:
    method_runs.assert_adds_to_tre(tmp_path, "adaptive_entropy", ON)


def test_micro_batch_size_changes_nothing(tmp_path: Path) -> None:
    method_runs.assert_micro_batches_change_nothing(tmp_path, ON)
