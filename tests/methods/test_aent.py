"""Tests of AEnt: clamped entropy, the coefficient's controller."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

import batches
from tre_lightning.batches import TrainingBatch
from tre_lightning.methods import AEnt
from tre_lightning.ops import Region

P = [0.06, 0.4, 0.2, 0.3, 0.04]
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
    out = batches.outputs(term, torch.tensor([P]).log())
    expected = torch.tensor([batches.entropy(0.4, 0.3, 0.2)])
    torch.testing.assert_close(term.observe(out, None), expected)
    torch.testing.assert_close(term.per_token(out, NONE), -expected)


def test_nothing_clamped_is_the_full_entropy() -> None:
    term = fitted(AEnt(clamp_p=0.0), 5)
    out = batches.outputs(term, torch.tensor([P]).log())
    assert term.observe(out, None).item() == pytest.approx(batches.entropy(*P), rel=1e-6)


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
    term.adapt(batches.without(rollout([0.0])))
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
