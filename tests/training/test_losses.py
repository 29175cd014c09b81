"""Tests of tre_lightning.training.losses."""

import math

import pytest
import torch

from tre_lightning.policy.head import label_logprobs
from tre_lightning.training.losses import masked_sum, policy_loss, policy_ratio, value_loss

# --- label_logprobs ---


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_label_logprobs_is_log_softmax_at_the_label(
    dtype: torch.dtype, result: torch.dtype
) -> None:
    torch.manual_seed(0)
    logits = (10 * torch.randn(2, 3, 7)).to(dtype)
    labels = torch.randint(7, (2, 3))
    logprobs = label_logprobs(logits, labels)
    assert logprobs.dtype == result and logprobs.shape == (2, 3)
    for b in range(2):
        for t in range(3):
            expected = logits[b, t].double().log_softmax(-1)[labels[b, t]]
            torch.testing.assert_close(logprobs[b, t].double(), expected, atol=2e-6, rtol=1e-6)


def test_label_logprobs_by_hand_with_an_impossible_token() -> None:
    logits = torch.tensor([[[math.log(3.0), 0.0, -math.inf]]])
    values = [label_logprobs(logits, torch.tensor([[label]])).item() for label in range(3)]
    assert values == pytest.approx([math.log(0.75), math.log(0.25), -math.inf])


# --- masked_sum ---


def test_masked_sum_ignores_what_is_outside_the_mask() -> None:
    values = torch.tensor([[1.0, math.nan, 2.0], [math.inf, 4.0, -math.inf]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    total = masked_sum(values, mask)
    assert total.item() == 7.0
    total.backward()
    assert torch.equal(values.grad, mask.float())


def test_masked_sum_shows_nan_inside_the_mask() -> None:
    assert masked_sum(torch.tensor([1.0, math.nan]), torch.tensor([True, True])).isnan()
    assert masked_sum(torch.tensor([math.nan]), torch.tensor([False])).item() == 0.0


# --- policy_loss ---


def test_policy_ratio_by_hand() -> None:
    ratio = policy_ratio(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0 - math.log(3.0)]))
    torch.testing.assert_close(ratio, torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "clipped"),
    [
        # clipped to [0.9, 1.3]: the pessimistic of the two surrogates counts
        (1.2, 2.0, None, -2.4, False),
        (1.2, -2.0, None, 2.4, False),
        (1.5, 2.0, None, -2.6, True),  # too likely already
        (1.5, -2.0, None, 3.0, False),  # the mistake must be undone
        (0.5, 2.0, None, -1.0, False),
        (0.5, -2.0, None, 1.8, True),  # too unlikely already
        (1.5, 0.0, None, 0.0, True),
        # the dual clip bounds the loss at 3 * |advantage| where the advantage is negative
        (5.0, -2.0, 3.0, 6.0, True),
        (2.0, -2.0, 3.0, 4.0, False),
        (0.5, -2.0, 3.0, 1.8, True),
        (5.0, 2.0, 3.0, -2.6, True),
        (0.5, 2.0, 3.0, -1.0, False),
    ],
)
def test_policy_loss_by_hand(
    ratio: float, advantage: float, dual_clip: float | None, loss: float, clipped: bool
) -> None:
    old = torch.tensor([[-3.0]], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    result = policy_loss(
        logprobs,
        old,
        torch.tensor([[advantage]], dtype=torch.float64),
        clip_eps_low=0.1,
        clip_eps_high=0.3,
        dual_clip=dual_clip,
    )
    assert result.shape == (1, 1)
    assert result.item() == pytest.approx(loss)
    result.sum().backward()
    # d(-advantage * ratio)/d(logprob) = -advantage * ratio; a clipped token has no gradient
    assert logprobs.grad.item() == pytest.approx(0.0 if clipped else -advantage * ratio)


def test_a_ratio_that_overflows_outside_the_mask_leaves_the_gradient_finite() -> None:
    # Padding, or a response that could not be scored: its log-probabilities mean nothing.
    logprobs = torch.tensor([[-1.0, -0.1]], requires_grad=True)
    old, advantages = torch.tensor([[-1.0, -120.0]]), torch.tensor([[2.0, 0.0]])
    loss = policy_loss(logprobs, old, advantages, clip_eps_low=0.2, clip_eps_high=0.2)
    masked_sum(loss, torch.tensor([[True, False]])).backward()
    assert logprobs.grad.tolist() == [[-2.0, 0.0]]


# --- value_loss ---


@pytest.mark.parametrize(
    ("value", "old", "target", "eps", "loss"),
    [
        (2.0, 1.0, 3.0, None, 0.5),
        (2.0, 1.0, 3.0, 0.5, 1.125),  # clipped to 1.5: (1.5 - 3)^2 / 2 is the larger one
        (2.0, 1.0, 0.0, 0.5, 2.0),  # clipped to 1.5, but 2^2 / 2 is larger
        (0.0, 1.0, -1.0, 0.5, 1.125),  # clipped from below to 0.5
        (1.2, 1.0, 3.0, 0.5, 1.62),  # near the old value: nothing is clipped
    ],
)
def test_value_loss_by_hand(
    value: float, old: float, target: float, eps: float | None, loss: float
) -> None:
    tensors = [torch.tensor([[x]]) for x in (value, old, target)]
    result = value_loss(*tensors, value_clip_eps=eps)
    assert result.shape == (1, 1)
    assert result.item() == pytest.approx(loss)


def test_an_open_end_is_not_clipped() -> None:
    ratio = torch.tensor([0.5, 1.5]).log()
    old = torch.zeros(2)
    # The pessimistic maximum: at A < 0 a ratio below 1 - eps, at A > 0 one above 1 + eps is cut.
    for advantage, low, high, expected in [
        (1.0, 0.2, None, [-0.5, -1.5]),
        (1.0, None, 0.2, [-0.5, -1.2]),
        (-1.0, 0.2, None, [0.8, 1.5]),
        (-1.0, None, 0.2, [0.5, 1.5]),
        (-1.0, None, None, [0.5, 1.5]),
    ]:
        made = policy_loss(
            ratio, old, torch.full((2,), advantage), clip_eps_low=low, clip_eps_high=high
        )
        torch.testing.assert_close(made, torch.tensor(expected))
