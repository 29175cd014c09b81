"""Tests of SIREN: masks, anchor, coefficient."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import batches
from batches import Rows
from tre_lightning.batches import TrainingBatch
from tre_lightning.methods import SIREN, LinearSchedule
from tre_lightning.methods.selection import above_quantile

P = [0.5, 0.3, 0.1, 0.1]
NONE = batches.tokens(0)


def rollout(*entropies: list[float]) -> TrainingBatch:
    rows: Rows = [[1.0] * len(row) for row in entropies]
    return batches.training_batch(rows, observed={"siren": entropies})


def test_entropy_is_that_of_the_renormalised_nucleus() -> None:
    term = SIREN(top_p=0.75)
    out = batches.outputs(term, torch.tensor([P, [0.97, 0.01, 0.01, 0.01]]).log())
    expected = torch.tensor([batches.entropy(0.5, 0.3), 0.0])
    torch.testing.assert_close(term.observe(out, None), expected)
    torch.testing.assert_close(term.per_token(out, NONE), expected)


def test_weights_make_the_mean_one_over_the_tokens_of_highest_entropy() -> None:
    # 4 tokens, 2 of them chosen: each stands for 4 / 2.
    weights = SIREN(fraction=0.5).token_weights(rollout([1.0, 5.0, 2.0], [3.0]))
    assert weights.tolist() == [[0.0, 2.0, 0.0], [2.0, 0.0, 0.0]]
    # ceil(0.3 * 4) = 2
    weights = SIREN(fraction=0.3).token_weights(rollout([4.0, 1.0], [2.0, 5.0]))
    assert weights.tolist() == [[2.0, 0.0], [0.0, 2.0]]
    assert SIREN(fraction=1.0).token_weights(rollout([4.0, 1.0])).tolist() == [[1.0, 1.0]]


# Entropies of four responses. The authors' quantile at tau = 0.75, interpolated: of [1, 2, 3, 4, 5]
# 4, of [1, 5, 2] 3.5, of one token itself, of [2, 2] 2. Above: 5; 5; none; none.
RESPONSES = ([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 5.0, 2.0], [9.0], [2.0, 2.0])


def test_within_responses_the_mean_is_the_authors() -> None:
    term = SIREN(coef=0.1, fraction=0.25, within="response")
    first = rollout(*RESPONSES)
    term.adapt(first)
    assert term.anchor == pytest.approx((5.0 + 5.0 + 0.0 + 0.0) / 4)
    # Each of 11 tokens counts as 1 / 11 in a loss; a chosen one as 1 / (responses x chosen there).
    weights = term.token_weights(first)
    assert weights.nonzero().tolist() == [[0, 4], [1, 1]]
    assert weights[weights > 0].tolist() == pytest.approx([11 / 4] * 2)
    # A response that could not be scored is no response.
    term.adapt(batches.without(first, 2, 3))
    assert term.entropy == pytest.approx(5.0)
    term.adapt(rollout([1.0, 3.0, 4.0], [7.0, 8.0]))  # quantiles 3.5 and 7.75
    assert term.entropy == pytest.approx((4.0 + 8.0) / 2)
    assert term.coef_at(0) == pytest.approx(2 * 0.1 * (6.0 - 2.5))


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=1, max_size=4),
    st.sampled_from([0.05, 0.2, 0.25, 0.5, 0.9, 1.0]),
)
def test_the_quantile_is_that_of_numpy(rows: list[list[int]], fraction: float) -> None:
    mask = batches.padded([[1.0] * len(row) for row in rows]).bool()
    above = above_quantile(batches.padded(rows, math.nan), mask, fraction)
    for row, found in zip(rows, above.tolist(), strict=True):
        quantile = np.quantile(np.array(row, dtype=float), 1 - fraction)
        expected = [bool(value > quantile + 1e-9) for value in row]
        assert found == expected + [False] * (len(found) - len(row))


def test_coefficient_follows_the_distance_to_the_first_rollout() -> None:
    term = SIREN(coef=0.1, fraction=0.5)
    assert term.coef_at(0) == 0.0 and term.logged() == {}
    seen = []
    # Means of the upper halves: 3.5, the anchor; 4.5; 2.5 (2 of 3 tokens); 3.5.
    for step in (
        rollout([1.0, 2.0, 3.0], [4.0]),
        rollout([1.0, 1.0, 4.0], [5.0]),
        rollout([3.0, 1.0], [2.0]),
        rollout([3.5]),
    ):
        term.adapt(step)
        seen.append(term.coef_at(0))
        assert term.logged()["anchor"] == 3.5
    assert seen == pytest.approx([0.0, 2 * 0.1 * 1.0, -2 * 0.1 * 1.0, 0.0])
    assert term.logged() == {"anchor": 3.5, "entropy": 3.5}


def test_beta_may_follow_a_schedule() -> None:
    term = SIREN(coef=LinearSchedule(0.4, 0.0, 2), fraction=1.0)
    term.adapt(rollout([1.0]))
    term.adapt(rollout([3.0]))
    assert [term.coef_at(i) for i in range(3)] == pytest.approx([1.6, 0.8, 0.0])


@pytest.mark.parametrize("anchor", [0.1, 3.0])  # the entropies lie between
def test_gradient_is_that_of_the_squared_distance(anchor: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (2.0 * torch.randn(5, 30, generator=generator)).double().requires_grad_()
    term = SIREN(coef=0.7, top_p=0.8, fraction=0.4)
    seen = term.observe(batches.outputs(term, logits), None).detach().tolist()
    term.adapt(rollout([anchor]))
    term.adapt(rollout(seen))
    loss = batches.mean_loss(term, logits, rollout(seen))
    (found,) = torch.autograd.grad(loss, logits)

    order = torch.sort(logits.softmax(-1), descending=True)
    nucleus = order.values.masked_fill(order.values.cumsum(-1) - order.values >= 0.8, 0.0)
    q = nucleus / nucleus.sum(-1, keepdim=True)
    entropies = -(q * q.clamp(min=1e-300).log()).sum(-1)
    square = 0.7 * (entropies.topk(2).values.mean() - anchor) ** 2  # 2 = ceil(0.4 * 5)
    (expected,) = torch.autograd.grad(square, logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    assert expected.abs().max() > 1e-3


def test_a_rollout_without_a_counted_token_changes_nothing() -> None:
    term = SIREN(coef=0.1, fraction=1.0)
    empty = batches.without(rollout([7.0]))
    term.adapt(empty)
    assert term.anchor is None
    term.adapt(rollout([1.0]))
    term.adapt(rollout([2.0]))
    term.adapt(empty)
    assert term.coef_at(0) == pytest.approx(0.2)
    assert term.token_weights(empty).tolist() == [[0.0]]


def test_state_keeps_the_anchor() -> None:
    term, resumed = SIREN(coef=0.1, fraction=1.0), SIREN(coef=0.1, fraction=1.0)
    term.adapt(rollout([1.0]))
    resumed.load_state_dict(term.state_dict())
    copied = pickle.loads(pickle.dumps(term))
    for each in (term, resumed, copied):
        each.adapt(rollout([4.0]))
        assert each.coef_at(0) == pytest.approx(2 * 0.1 * 3.0)


def test_defaults_are_those_of_the_authors_script() -> None:
    term = SIREN()
    assert (term.coef, term.region.top_p, term.fraction) == (0.005, 0.8, 0.2)
