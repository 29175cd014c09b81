"""Tests of PAEC: score, soft mask, anchor, floor."""

import math
import pickle
from collections.abc import Sequence

import pytest
import torch

import batches
from tre_lightning.batches import TrainingBatch
from tre_lightning.methods import PAEC, LinearSchedule

P = [0.5, 0.3, 0.1, 0.1]
SURE = [0.97, 0.02, 0.005, 0.005]
NONE = batches.tokens(0)


def rollout(*rows: Sequence[tuple[float, float]]) -> TrainingBatch:
    """Tokens of these scores and entropies."""
    advantages = [[1.0] * len(row) for row in rows]
    return batches.training_batch(advantages, observed={"paec": rows})  # type: ignore[dict-item]


def flat(entropy: float) -> TrainingBatch:
    """A rollout of this masked mean entropy; its second token is not chosen where half are."""
    return rollout([(0.5, entropy), (0.25, 100.0)])


def test_score_and_entropy_by_hand() -> None:
    term = PAEC(top_p=0.85, mix=0.25)
    out = batches.outputs(term, torch.tensor([P, SURE, [0.25] * 4]).log())
    three = batches.entropy(0.5, 0.3, 0.1)
    two = [batches.entropy(0.5, 0.3), batches.entropy(0.97, 0.02)]
    expected = torch.tensor(
        [
            [0.75 * three / math.log(3) + 0.25 * two[0] / math.log(2), three],
            [0.25 * two[1] / math.log(2), 0.0],  # a nucleus of one token
            [1.0, math.log(4)],
        ]
    )
    torch.testing.assert_close(term.observe(out, None), expected)
    torch.testing.assert_close(term.per_token(out, NONE), -expected[:, 1])


def test_competition_falls_with_the_gap_of_the_two_best() -> None:
    term = PAEC(top_p=0.5, mix=1.0)
    gaps = torch.arange(6.0)
    logits = torch.stack([gaps, torch.zeros(6), torch.full((6,), -9.0)], 1)
    scores = term.observe(batches.outputs(term, logits), None)[:, 0]
    assert scores[0].item() == pytest.approx(1.0, abs=1e-6)
    assert (scores.diff() < 0.0).all() and scores[-1] > 0.0


def test_weights_are_the_scores_of_the_chosen() -> None:
    batch = rollout([(0.2, 1.0), (0.8, 2.0)], [(0.4, 3.0)], [(0.1, 9.0)])
    weights = PAEC(fraction=0.5).token_weights(batch)  # 4 tokens, of which 0.8 and 0.4
    expected = torch.tensor([[0.0, 4 * 0.8 / 1.2], [4 * 0.4 / 1.2, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(weights, expected)


def test_no_score_no_weight() -> None:
    batch = rollout([(0.0, 1.0), (0.0, 2.0)])
    term = PAEC(anchor_iterations=1)
    assert term.token_weights(batch).tolist() == [[0.0, 0.0]]
    term.adapt(batch)
    assert term.anchor is None


def test_masked_mean_by_hand() -> None:
    term = PAEC(fraction=0.5)
    term.adapt(rollout([(0.2, 1.0), (0.8, 2.0)], [(0.4, 3.0)], [(0.1, 9.0)]))
    assert term.logged() == {"entropy": pytest.approx((0.8 * 2.0 + 0.4 * 3.0) / 1.2)}


def test_penalty_acts_below_the_floor_only() -> None:
    term = PAEC(coef=0.1, fraction=0.5, anchor_iterations=2, floor_fraction=0.5)
    assert term.coef_at(0) == 0.0 and term.logged() == {}
    seen = []
    for mean in (3.0, 1.0, 0.75, 1.0, 5.0, 0.0):  # the anchor is 2, the floor 1
        term.adapt(flat(mean))
        seen.append(term.coef_at(0))
    assert seen == pytest.approx([0.0, 0.0, 2 * 0.1 * 0.25, 0.0, 0.0, 2 * 0.1 * 1.0])
    assert term.logged() == {"entropy": 0.0, "anchor": 2.0}


def test_beta_may_follow_a_schedule() -> None:
    term = PAEC(
        coef=LinearSchedule(0.4, 0.0, 2), anchor_iterations=1, floor_fraction=1.0, fraction=0.5
    )
    term.adapt(flat(3.0))
    term.adapt(flat(1.0))
    assert [term.coef_at(i) for i in range(3)] == pytest.approx([1.6, 0.8, 0.0])


def test_gradient_is_that_of_the_penalty() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = (2.0 * torch.randn(5, 30, generator=generator)).double().requires_grad_()
    term = PAEC(coef=0.7, top_p=0.8, fraction=0.4, anchor_iterations=1, floor_fraction=1.0)
    seen = term.observe(batches.outputs(term, logits), None).detach()
    batch = rollout([(float(score), float(entropy)) for score, entropy in seen])
    term.adapt(rollout([(1.0, 9.0)]))  # the floor
    term.adapt(batch)
    (found,) = torch.autograd.grad(batches.mean_loss(term, logits, batch), logits)

    order = torch.sort(logits.softmax(-1), descending=True)
    nucleus = order.values.masked_fill(order.values.cumsum(-1) - order.values >= 0.8, 0.0)
    q = nucleus / nucleus.sum(-1, keepdim=True)
    entropies = -(q * q.clamp(min=1e-300).log()).sum(-1)
    best = seen[:, 0].topk(2)  # 2 = ceil(0.4 * 5)
    mean = (best.values * entropies[best.indices]).sum() / best.values.sum()
    (expected,) = torch.autograd.grad(0.7 * (9.0 - mean) ** 2, logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert expected.abs().max() > 1e-2


def test_a_rollout_without_a_counted_token_changes_nothing() -> None:
    term = PAEC()
    empty = batches.without(flat(1.0))
    term.adapt(empty)
    assert term.state_dict() == {"first": []}
    assert term.token_weights(empty).tolist() == [[0.0, 0.0]]


def test_state_keeps_the_anchor() -> None:
    def new() -> PAEC:
        return PAEC(coef=0.1, fraction=0.5, anchor_iterations=2, floor_fraction=1.0)

    term, resumed = new(), new()
    term.adapt(flat(3.0))
    state = term.state_dict()
    resumed.load_state_dict(state)
    copied = pickle.loads(pickle.dumps(term))
    for each in (term, resumed, copied):
        each.adapt(flat(1.0))
        each.adapt(flat(0.5))
        assert each.coef_at(0) == pytest.approx(2 * 0.1 * 1.5)
    assert state == {"first": [3.0]}  # what was saved does not change afterwards
