"""Tests of AEnt: clamped entropy, the coefficient's controller, and whole runs."""

import math
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import batches
import method_runs
import runs
from tre_lightning.batches import TrainingBatch
from tre_lightning.methods import AEnt
from tre_lightning.ops import Region

P = [0.06, 0.4, 0.2, 0.3, 0.04]
# The clamped entropy of the tiny run is near log 34 = 3.53.
OPTIONS = {"coef": 0.01, "low": 3.6, "high": 3.7, "step": 0.1, "coef_max": 1.0}
ON = method_runs.spec("AEnt", **OPTIONS)
NONE = batches.tokens(0)


def rollout(*entropies: list[float]) -> TrainingBatch:
    rows = [[1.0] * len(row) for row in entropies]
    return batches.training_batch(rows, observed={"aent": entropies})


def fitted(term: AEnt, vocabulary: int) -> AEnt:
    """The term once the fit of a model of this vocabulary has started."""
    config = AutoConfig.for_model("llama", vocab_size=vocabulary)
    module = SimpleNamespace(actor_critic=SimpleNamespace(policy=SimpleNamespace(config=config)))
    term.on_fit_start(SimpleNamespace(), module)  # type: ignore[arg-type]
    return term


def test_entropy_is_that_of_the_tokens_that_are_left() -> None:
    term = fitted(AEnt(clamp_p=0.4), 5)  # without the 2 least probable
    out = method_runs.outputs(term, torch.tensor([P]).log())
    expected = torch.tensor([method_runs.entropy(0.4, 0.3, 0.2)])
    torch.testing.assert_close(term.observe(out, None), expected)
    torch.testing.assert_close(term.per_token(out, NONE), -expected)


def test_nothing_clamped_is_the_full_entropy() -> None:
    term = fitted(AEnt(clamp_p=0.0), 5)
    out = method_runs.outputs(term, torch.tensor([P]).log())
    assert term.observe(out, None).item() == pytest.approx(method_runs.entropy(*P), rel=1e-6)


@pytest.mark.parametrize(
    ("clamp_p", "vocabulary", "left"),
    [(0.3, 10, 7), (0.3, 48, 34), (0.25, 7, 6), (0.999, 3, 1), (0.3, 151936, 106356)],
)
def test_floor_p_v_tokens_are_left_out(clamp_p: float, vocabulary: int, left: int) -> None:
    assert fitted(AEnt(clamp_p=clamp_p), vocabulary).regions == (Region(top_k=left),)


def test_coefficient_by_hand() -> None:
    term = AEnt(coef=0.001, low=0.25, high=0.5, step=0.01, coef_min=0.0005, coef_max=0.004)
    assert term.coef_at(0) == 0.001
    seen = []
    for mean in (0.125, 0.25, 0.375, 0.125, 0.0, 0.75, 0.5, 1.0):
        # Two tokens around the mean: neither alone decides.
        term.adapt(rollout([mean + 4.0], [mean - 4.0]))
        seen.append(term.coef_at(0))
        assert term.logged() == {"entropy": pytest.approx(mean)}
    assert seen == pytest.approx(
        [
            0.00225,  # 0.125 too low: + 0.01 * 0.125
            0.00225,  # at the bound
            0.00225,  # between them
            0.0035,
            0.004,  # 0.006, held at the largest
            0.0015,  # 0.25 too high: - 0.01 * 0.25
            0.0015,
            0.0005,  # -0.0035, held at the smallest
        ]
    )


def test_warmup_holds_the_first_coefficient() -> None:
    term = AEnt(coef=0.001, low=0.5, high=0.5, step=0.01, warmup=2)
    seen = []
    for term.iteration in range(4):
        term.adapt(rollout([0.25]))
        seen.append(term.coef_at(term.iteration))
    assert seen == pytest.approx([0.001, 0.001, 0.0035, 0.006])


def test_coefficient_0_stays_0() -> None:
    term = AEnt(coef=0.0, low=0.5, high=0.6, step=1.0)
    term.adapt(rollout([0.0]))
    assert term.coef_at(0) == 0.0


def test_a_coefficient_that_fell_to_0_rises_again() -> None:
    term = AEnt(coef=0.01, low=0.5, high=0.5, step=0.01, coef_min=0.0)
    term.adapt(rollout([9.0]))
    assert term.coef_at(0) == 0.0
    term.adapt(rollout([0.25]))
    assert term.coef_at(0) == pytest.approx(0.0025)


def test_a_rollout_without_a_counted_token_changes_nothing() -> None:
    term = AEnt(step=0.1)
    empty = rollout([0.0])
    term.adapt(replace(empty, response_mask=torch.zeros_like(empty.response_mask)))
    assert term.coef_at(0) == 0.001 and term.logged() == {}


def test_state_keeps_the_coefficient() -> None:
    term = fitted(AEnt(low=0.5, high=0.5, step=0.01), 5)
    term.adapt(rollout([0.25]))
    resumed = AEnt(low=0.5, high=0.5, step=0.01)
    resumed.load_state_dict(term.state_dict())
    copied = pickle.loads(pickle.dumps(term))
    assert copied.regions == term.regions
    for each in (term, resumed, copied):
        each.adapt(rollout([0.25]))
        assert each.coef_at(0) == pytest.approx(0.001 + 2 * 0.0025)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coef": -1.0}, r"\[aent\]\.coef=-1.0"),
        ({"clamp_p": 1.0}, r"clamp_p=1.0 "),
        ({"low": 0.6}, r"low=0.6 .*high=0.5"),
        ({"low": -0.1}, r"low=-0.1 "),
        ({"step": math.nan}, r"step=nan "),
        ({"coef_min": 0.02}, r"coef_min=0.02 .*coef_max=0.01"),
        ({"coef": 0.02}, r"coef=0.02 .*coef_max=0.01"),
        ({"warmup": -1}, r"warmup=-1 "),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AEnt(**options)


# --- whole runs ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return method_runs.run(tmp_path_factory.mktemp("aent") / "run", ON, **method_runs.KEEP)


def test_a_run_moves_the_coefficient(whole: Path) -> None:
    entropies = method_runs.logged(whole, "loss/aent_entropy")
    assert all(3.0 < entropy <= math.log(34) for entropy in entropies)
    coef, expected = 0.01, []
    for entropy in entropies:
        coef += 0.1 * (3.6 - entropy)
        expected.append(coef)
    found = method_runs.logged(whole, "loss/aent_coef")
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(found) == runs.ITERATIONS


def test_resumed(whole: Path, tmp_path: Path) -> None:
    method_runs.assert_resumes(whole, tmp_path, ON)


def test_coef_0_is_ppo(whole: Path, tmp_path: Path) -> None:
    off = method_runs.spec("AEnt", **{**OPTIONS, "coef": 0.0})
    method_runs.assert_off(method_runs.run(tmp_path / "off", off), whole)


def test_beside_tre(tmp_path: Path) -> None:
    method_runs.assert_adds_to_tre(tmp_path, "aent", ON)


def test_micro_batch_size_changes_nothing(tmp_path: Path) -> None:
    method_runs.assert_micro_batches_change_nothing(tmp_path, ON)
