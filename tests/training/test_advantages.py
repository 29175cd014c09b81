"""Tests of tre_lightning.training.advantages."""

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tre_lightning.common.metrics import centred
from tre_lightning.policy.actor_critic import PolicyArgs
from tre_lightning.training.advantages import (
    Estimator,
    check_estimator,
    estimate,
    gae,
    grpo,
    reinforce_pp,
    rloo,
    whitened,
)
from tre_lightning.training.ppo import PPOModule

NAN = math.nan


# --- gae ---


def test_gae_by_hand() -> None:
    # delta_2 = 1 - 0.2 = 0.8; delta_1 = 0.9 * 0.2 - 0.4 = -0.22; delta_0 = 0.9 * 0.4 - 0.5 = -0.14
    # A_2 = 0.8; A_1 = -0.22 + 0.72 * 0.8 = 0.356; A_0 = -0.14 + 0.72 * 0.356 = 0.11632
    # The second row ends after two tokens; what stands behind its end must not count:
    # delta_1 = 1 - 0.4 = 0.6; A_0 = 0.1 + 0.9 * 0.4 - 0.5 + 0.72 * 0.6 = 0.392
    advantages, returns = gae(
        torch.tensor([[0.0, 0.0, 1.0], [0.1, 1.0, 7.0]]),
        torch.tensor([[0.5, 0.4, 0.2], [0.5, 0.4, 99.0]]),
        torch.tensor([[True, True, True], [True, True, False]]),
        gamma=0.9,
        gae_lambda=0.8,
    )
    torch.testing.assert_close(advantages, torch.tensor([[0.11632, 0.356, 0.8], [0.392, 0.6, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.61632, 0.756, 1.0], [0.892, 1.0, 0.0]]))


def test_without_discount_returns_are_the_rewards_to_go() -> None:
    torch.manual_seed(0)
    mask = torch.arange(6) < torch.tensor([6, 1, 4]).unsqueeze(1)
    rewards, values = torch.randn(3, 6), torch.randn(3, 6)
    _, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    for row, length in enumerate((6, 1, 4)):
        to_go = [float(rewards[row, t:length].sum()) for t in range(length)]
        assert returns[row].tolist() == pytest.approx([*to_go, *[0.0] * (6 - length)], abs=1e-5)


def test_lambda_0_is_the_one_step_error() -> None:
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages, _ = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[1 + 0.5 * 0.25 - 0.5, 2 - 0.25]]))


def test_what_stands_at_padding_does_not_count() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    torch.manual_seed(0)
    clean = [torch.where(mask, torch.randn(2, 3), 0.0) for _ in range(2)]
    for padding in (NAN, math.inf, -math.inf, 7.0):
        rewards, values = (torch.where(mask, part, padding) for part in clean)
        for estimator in get_args(Estimator):
            rules: dict[str, Any] = {"num_responses": 2, "gamma": 0.9, "gae_lambda": 0.8}
            found = estimate(estimator, rewards, values, mask, **rules)
            expected = estimate(estimator, *clean, mask, **rules)
            for left, right in zip(found, expected, strict=True):
                assert left is right is None or torch.equal(left, right), (estimator, padding)


def test_a_gap_in_the_mask_ends_an_episode_of_gae() -> None:
    # As the docstring says: the row is two episodes, of one token and of two.
    gap = torch.tensor([[True, False, True, True]])
    rewards, values = torch.tensor([[1.0, 50.0, 2.0, 4.0]]), torch.tensor([[0.5, 90.0, 0.25, 1.0]])
    advantages, returns = gae(rewards, values, gap, gamma=0.5, gae_lambda=1.0)
    assert returns.tolist() == [[1.0, 0.0, 2.0 + 0.5 * 4.0, 4.0]]
    assert advantages.tolist() == [[0.5, 0.0, 3.75, 3.0]]
    assert reinforce_pp(rewards, gap, gamma=0.5).tolist() == [[1.0, 0.0, 4.0, 4.0]]
    # R = 1 + 2 + 4 against 1
    two = torch.cat([rewards, torch.tensor([[1.0, 9.0, 9.0, 9.0]])])
    mask = torch.cat([gap, torch.tensor([[True, False, False, False]])])
    assert rloo(two, mask, 2).tolist() == [[6.0, 0.0, 6.0, 6.0], [-6.0, 0.0, 0.0, 0.0]]


# --- whitened ---


def test_whitening_counts_only_the_mask() -> None:
    values = torch.tensor([[1.0, 100.0], [3.0, NAN]])
    mask = torch.tensor([[True, False], [True, False]])
    torch.testing.assert_close(whitened(values, mask), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))


def test_whitened_values_have_mean_0_and_variance_1() -> None:
    torch.manual_seed(0)
    values, mask = 5 + 3 * torch.randn(8, 9), torch.rand(8, 9) < 0.6
    white = whitened(values, mask)
    counted = white[mask]
    assert counted.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert counted.square().mean().item() == pytest.approx(1.0, abs=1e-5)
    assert (white[~mask] == 0).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("counted", [0, 1, 3, 7])
def test_equal_values_are_at_their_mean_however_far_from_0(
    counted: int, dtype: torch.dtype
) -> None:
    mask = torch.arange(7) < counted
    for value in (0.75, 0.1, -1.1, 1e6 + 0.1, -3e30, 1e-30):
        values = torch.full((7,), value, dtype=dtype).masked_fill(~mask, NAN)
        white = whitened(values, mask)
        assert white.dtype == dtype
        assert torch.equal(white, torch.zeros(7, dtype=dtype)), value
        assert torch.equal(centred(values, mask)[0], torch.zeros(7, dtype=torch.float64)), value


@pytest.mark.filterwarnings("error")
def test_whitening_nothing_at_all() -> None:
    assert whitened(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).shape == (0, 3)


def test_whitening_far_from_0_keeps_small_differences() -> None:
    # 2^20 and 2^20 + 1: their mean is no float32.
    values, mask = torch.tensor([2.0**20, 2.0**20 + 1]), torch.ones(2, dtype=torch.bool)
    torch.testing.assert_close(whitened(values, mask), torch.tensor([-1.0, 1.0]))


# --- groups ---

# Two prompts of three responses. The fifth could not be scored; what stands outside the mask must
# not count. R = 1, 0, 5 and 2, -, 4.
REWARDS = torch.tensor(
    [
        [-1.0, 0.5, 1.5],
        [0.0, 9.0, 9.0],
        [2.0, 3.0, NAN],
        [1.0, 1.0, 9.0],
        [7.0, NAN, 9.0],
        [0.5, 0.5, 3.0],
    ]
)
LENGTHS = torch.tensor([3, 1, 2, 2, 0, 3])
MASK = torch.arange(3) < LENGTHS.unsqueeze(1)


def at_every_token(advantages: list[float]) -> Tensor:
    return torch.tensor(advantages).unsqueeze(1) * MASK


def test_grpo_by_hand() -> None:
    # First group: mean 2, deviations -1, -2, 3, sample variance 14 / 2 = 7.
    # Second group, of the two scored ones: mean 3, deviations -1, 1, sample variance 2 / 1.
    by_std = [-1 / 7**0.5, -2 / 7**0.5, 3 / 7**0.5, -1 / 2**0.5, 0.0, 1 / 2**0.5]
    torch.testing.assert_close(grpo(REWARDS, MASK, 3), at_every_token(by_std), atol=2e-6, rtol=0)
    # eps is added to the standard deviation: sqrt(7) + 1 and sqrt(2) + 1.
    damped = [-1 / 3.6457513, -2 / 3.6457513, 3 / 3.6457513, -1 / 2.4142136, 0.0, 1 / 2.4142136]
    torch.testing.assert_close(grpo(REWARDS, MASK, 3, eps=1.0), at_every_token(damped))


def test_rloo_by_hand() -> None:
    # 1 - (0 + 5) / 2, 0 - (1 + 5) / 2, 5 - (1 + 0) / 2; then 2 - 4 and 4 - 2
    expected = at_every_token([-1.5, -3.0, 4.5, -2.0, 0.0, 2.0])
    torch.testing.assert_close(rloo(REWARDS, MASK, 3), expected)


def test_reinforce_pp_by_hand() -> None:
    # 1.5; 0.5 + 1.5 / 2; -1 + 1.25 / 2, and so on; no row looks at another
    expected = [
        [-0.375, 1.25, 1.5],
        [0.0, 0.0, 0.0],
        [3.5, 3.0, 0.0],
        [1.5, 1.0, 0.0],
        [0.0, 0.0, 0.0],
        [1.5, 2.0, 3.0],
    ]
    rewards = REWARDS.nan_to_num(8.0)  # as token_rewards, which is finite everywhere
    assert reinforce_pp(rewards, MASK, gamma=0.5).tolist() == expected


@pytest.mark.parametrize("estimator", [grpo, rloo])
def test_a_group_that_tells_nothing_has_advantage_0(estimator: Any) -> None:
    # The float32 mean of ten times 1.1 is not 1.1: of its rounding, GRPO would make -0.1.
    equal = torch.full((10, 1), 1.1)
    assert equal.mean() != equal[0]
    for scored in (10, 1, 0):
        advantages = estimator(equal, torch.arange(10).unsqueeze(1) < scored, 10)
        assert advantages.dtype == torch.float32
        assert torch.equal(advantages, torch.zeros(10, 1))
    # Sums of many numbers need all digits of a float64; equal ones are equal all the same.
    alike = torch.linspace(0.1, 0.7, 9).log().expand(10, 9) * 1e5
    for scored in (10, 7, 3):
        mask = (torch.arange(10) < scored).unsqueeze(1).expand(10, 9)
        assert torch.equal(estimator(alike, mask, 10), torch.zeros(10, 9))


@st.composite
def groups(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Rewards, mask and n of some groups; small whole rewards, so that spreads are 0 or large."""
    n = draw(st.integers(2, 5))
    rows, width = n * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))
    numbers = st.lists(st.integers(-5, 5), min_size=width, max_size=width)
    rewards = draw(st.lists(numbers, min_size=rows, max_size=rows))
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    return torch.tensor(rewards, dtype=torch.float32), mask, n


def scored_groups(rewards: Tensor, mask: Tensor, n: int) -> list[list[tuple[int, float]]]:
    """Row and reward of the scored responses of each group."""
    total = (rewards * mask).sum(1).tolist()
    counted = mask.any(1).tolist()
    starts = range(0, len(total), n)
    return [[(i, total[i]) for i in range(s, s + n) if counted[i]] for s in starts]


@given(groups())
def test_rloo_is_the_scaled_distance_of_the_mean(case: tuple[Tensor, Tensor, int]) -> None:
    rewards, mask, n = case
    advantages = rloo(rewards, mask, n)
    assert (advantages[~mask] == 0).all()
    for group in scored_groups(*case):
        for i, reward in group:
            others = [other for j, other in group if j != i]
            k = len(group)
            left_out = reward - sum(others) / len(others) if others else 0.0
            mean = sum(other for _, other in group) / k
            assert left_out == pytest.approx(k / max(k - 1, 1) * (reward - mean), abs=1e-9)
            assert advantages[i][mask[i]].tolist() == pytest.approx(
                [left_out] * int(mask[i].sum()), rel=1e-6, abs=1e-6
            )


@given(groups(), st.integers(1, 20), st.integers(-50, 50))
def test_grpo_sees_neither_unit_nor_origin_of_the_scores(
    case: tuple[Tensor, Tensor, int], unit: int, origin: int
) -> None:
    rewards, mask, n = case
    moved = unit * rewards
    moved[:, 0] += origin  # every scored response has a first token
    advantages = grpo(rewards, mask, n)
    torch.testing.assert_close(grpo(moved, mask, n), advantages, atol=1e-5, rtol=0)
    for group in scored_groups(*case):
        found = [advantages[i, 0].item() for i, _ in group]
        assert sum(found) == pytest.approx(0.0, abs=1e-5)
        if len({reward for _, reward in group}) > 1:  # one sample deviation of spread
            assert sum(a * a for a in found) == pytest.approx(len(group) - 1, rel=1e-4)


# --- whether an estimator fits the run ---


@pytest.mark.parametrize("estimator", get_args(Estimator))
@pytest.mark.parametrize("critic", ["separate", "shared", "none"])
def test_only_gae_has_a_critic(estimator: Any, critic: Any) -> None:
    made = {"policy": PolicyArgs(critic=critic), "ppo": {"estimator": estimator}}
    if (estimator == "gae") == (critic != "none"):
        assert PPOModule(**made).ppo_args.estimator == estimator
        return
    fix = "set critic to separate or shared" if critic == "none" else "set critic to none"
    field = rf"model\.policy\.critic={critic}, but model\.ppo\.estimator={estimator} .*{fix}"
    with pytest.raises(ValueError, match=field):
        PPOModule(**made)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_a_group_is_more_than_one_response(estimator: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"num_responses=1, but .*estimator={estimator} .*at least 2"
    ):
        check_estimator(estimator, "none", 1)
    check_estimator(estimator, "none", 2)
    check_estimator("reinforce_pp", "none", 1)
    check_estimator("gae", "shared", 1)
