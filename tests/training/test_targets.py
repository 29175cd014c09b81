"""Tests of tre_lightning.training.targets."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tre_lightning.batches import Experience, Rollout, TrainingBatch
from tre_lightning.training.advantages import Estimator, grpo, rloo, whitened
from tre_lightning.training.kl import KLEstimator
from tre_lightning.training.targets import (
    build_experience,
    compute_targets,
    minibatches,
    token_rewards,
)

NAN = math.nan


def experience(
    lengths: list[int],
    scores: list[float],
    *,
    prompt_lengths: list[int] | None = None,
    values: Tensor | None = None,
    old: Tensor | None = None,
    ref: Tensor | None = None,
    width: int | None = None,
    prompt_width: int | None = None,
) -> Experience:
    """Responses of these lengths; token ids tell rows and columns apart."""
    prompt_lengths = prompt_lengths or [1] * len(lengths)
    rows = torch.arange(1, len(lengths) + 1).unsqueeze(1) * 100
    columns = torch.arange(width or max(lengths))
    prompt_columns = torch.arange(-(prompt_width or max(prompt_lengths)), 0)
    response_mask = columns < torch.tensor(lengths).unsqueeze(1)
    prompt_mask = prompt_columns >= -torch.tensor(prompt_lengths).unsqueeze(1)
    rollout = Rollout(
        prompt_ids=torch.where(prompt_mask, rows - prompt_columns, 0),
        prompt_mask=prompt_mask,
        response_ids=torch.where(response_mask, rows + columns, 0),
        response_mask=response_mask,
        finished=torch.tensor([length % 2 == 0 for length in lengths]),
    )
    zeros = torch.zeros(response_mask.shape)
    return build_experience(
        rollout,
        torch.tensor(scores),
        zeros if old is None else old,
        ref,
        zeros if values is None else values,
    )


def targets(
    experience: Experience,
    *,
    estimator: Estimator = "gae",
    num_responses: int = 1,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k1",
    whiten: bool | None = False,
) -> TrainingBatch:
    return compute_targets(
        experience,
        estimator=estimator,
        num_responses=num_responses,
        gamma=gamma,
        gae_lambda=gae_lambda,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        whiten=whiten,
    )


def same(a: TrainingBatch, b: TrainingBatch) -> bool:
    parts: list[dict[str, Tensor]] = [{}, {}]
    for batch, found in zip((a, b), parts, strict=True):
        batch.map(lambda name, tensor, found=found: found.setdefault(name, tensor))
    return parts[0].keys() == parts[1].keys() and all(
        torch.equal(parts[0][name], parts[1][name]) for name in parts[0]
    )


# --- token_rewards ---


def test_the_score_stands_on_the_last_counted_token() -> None:
    rewards = token_rewards(experience([3, 1, 2], [2.0, -1.0, 0.5]), 0.5, "k1")
    expected = [[0.0, 0.0, 2.0], [-1.0, 0.0, 0.0], [0.0, 0.5, 0.0]]
    assert torch.equal(rewards, torch.tensor(expected))


def test_the_kl_penalty_stands_on_every_counted_token() -> None:
    # r = p_ref / p_old is 2, 1/2 and 1: k1 gives -log r, k2 its half square, k3 r - 1 - log r
    old = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -5.0, -5.0]])
    ref = old + torch.tensor([[math.log(2), -math.log(2), 0.0], [math.log(2), 3.0, 3.0]])
    shown, log_two = experience([3, 1], [1.0, 3.0], old=old, ref=ref), math.log(2)
    cases: tuple[tuple[KLEstimator, float, float], ...] = (
        ("k1", -log_two, log_two),
        ("k2", log_two**2 / 2, log_two**2 / 2),
        ("k3", 1 - log_two, log_two - 0.5),
    )
    for estimator, up, down in cases:
        rewards = token_rewards(shown, 0.1, estimator)
        expected = [[-0.1 * up, -0.1 * down, 1.0], [3.0 - 0.1 * up, 0.0, 0.0]]
        torch.testing.assert_close(rewards, torch.tensor(expected), atol=1e-6, rtol=0)


def test_a_reference_that_another_asks_for_is_no_penalty() -> None:
    old, ref = torch.zeros(1, 2), torch.tensor([[-math.inf, 1.0]])
    rewards = token_rewards(experience([2], [1.0], old=old, ref=ref), 0.0, "k1")
    assert rewards.tolist() == [[0.0, 1.0]]


def test_the_score_stands_on_the_last_token_behind_a_gap() -> None:
    shown = experience([4, 4], [1.0, 2.0])
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    rewards = token_rewards(replace(shown, response_mask=mask), 0.0, "k1")
    assert rewards.tolist() == [[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 2.0]]


def test_a_response_without_counted_tokens_gets_no_reward() -> None:
    rewards = token_rewards(experience([2, 2], [NAN, 1.0]), 0.0, "k1")
    assert torch.equal(rewards, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


# --- experience and targets ---


def test_an_unscorable_response_does_not_count() -> None:
    old, ref, values = (torch.randn(3, 4) for _ in range(3))
    whole = experience([4, 3, 2], [1.0, NAN, 0.0], old=old, ref=ref, values=values)
    assert whole.response_mask.tolist() == [[True] * 4, [False] * 4, [True, True, False, False]]
    assert whole.scores.isnan().tolist() == [False, True, False]
    keep = torch.tensor([0, 2])
    without = experience([4, 2], [1.0, 0.0], old=old[keep], ref=ref[keep], values=values[keep])
    batch = targets(whole, whiten=True, kl_coef=0.1)
    expected = targets(without, whiten=True, kl_coef=0.1)
    for name in ("rewards", "advantages", "returns"):
        assert (getattr(batch, name)[1] == 0).all()
        torch.testing.assert_close(getattr(batch, name)[keep], getattr(expected, name))


@pytest.mark.filterwarnings("error")
def test_a_rollout_without_any_score_has_finite_targets() -> None:
    batch = targets(experience([2, 1], [NAN, NAN], values=torch.ones(2, 2)), whiten=True)
    assert not batch.response_mask.any()
    for name in ("rewards", "advantages", "returns"):
        assert torch.equal(getattr(batch, name), torch.zeros(2, 2))


def test_compute_targets_passes_every_option_on() -> None:
    values = torch.tensor([[0.5, 0.4, 0.2]])
    old = torch.full((1, 3), -1.0)
    plain = experience([3], [1.0], values=values, old=old)
    batch = targets(plain, gamma=0.9, gae_lambda=0.8, kl_coef=0.1, whiten=False)
    # the example of test_gae_by_hand in test_advantages.py
    torch.testing.assert_close(batch.advantages, torch.tensor([[0.11632, 0.356, 0.8]]))
    torch.testing.assert_close(batch.returns, torch.tensor([[0.61632, 0.756, 1.0]]))
    white = targets(plain, gamma=0.9, gae_lambda=0.8, kl_coef=0.1, whiten=True)
    torch.testing.assert_close(white.advantages, whitened(batch.advantages, batch.response_mask))
    torch.testing.assert_close(white.returns, batch.returns)  # targets of the critic stay
    with_ref = experience([3], [1.0], values=values, old=old, ref=old + math.log(2))
    penalised = targets(with_ref, gamma=0.9, gae_lambda=0.8, kl_coef=0.1)
    penalty = 0.1 * -math.log(2)
    torch.testing.assert_close(penalised.rewards, torch.tensor([[-penalty, -penalty, 1 - penalty]]))
    squared = targets(with_ref, kl_coef=0.1, kl_estimator="k2").rewards[0, 0].item()
    assert squared == pytest.approx(-0.1 * math.log(2) ** 2 / 2)


def without_critic(lengths: list[int], scores: list[float], **parts: Tensor) -> Experience:
    return replace(experience(lengths, scores, **parts), values=None)


def test_without_a_critic_there_are_no_returns() -> None:
    lengths, scores = [3, 1, 2, 2], [1.0, 0.0, NAN, 5.0]
    old = torch.full((4, 3), -1.0)
    shown = without_critic(lengths, scores, old=old, ref=old + math.log(2))
    mask = shown.response_mask
    # R = score - length x penalty; the last response is alone in its group
    penalty = 0.1 * -math.log(2)
    first, second = 1.0 - 3 * penalty, 0.0 - penalty
    gap, half = first - second, math.sqrt(0.5)
    at_each = torch.tensor([[1.0], [-1.0], [0.0], [0.0]]) * mask
    for estimator, size in (("rloo", gap), ("grpo", half)):
        batch = targets(shown, estimator=estimator, num_responses=2, kl_coef=0.1, whiten=None)
        assert batch.returns is None and batch.values is None
        torch.testing.assert_close(batch.advantages, size * at_each, atol=1e-5, rtol=0)
        parts = list(minibatches(batch, 2, "key"))  # what is not there is left out of all slices
        assert parts[0].trimmed().returns is None and len(parts[0]) == 2


def test_each_paper_has_its_own_way_to_whiten() -> None:
    shown = experience([3, 1, 2, 2], [1.0, 0.0, 3.0, 5.0], values=torch.rand(4, 3))
    mask = shown.response_mask
    for estimator, whitens in (("gae", True), ("reinforce_pp", True), ("grpo", False)):
        plain, white, default = (
            targets(shown, estimator=estimator, num_responses=2, whiten=whiten).advantages
            for whiten in (False, True, None)
        )
        torch.testing.assert_close(white, whitened(plain, mask))
        assert not torch.allclose(white, plain, atol=1e-3)
        assert torch.equal(default, white if whitens else plain), estimator
    batch = targets(shown, estimator="rloo", num_responses=4, whiten=None)
    assert torch.equal(batch.advantages, rloo(batch.rewards, mask, 4))  # all four are one group
    batch = targets(shown, estimator="grpo", num_responses=4, whiten=None)
    assert torch.equal(batch.advantages, grpo(batch.rewards, mask, 4))


def test_reinforce_pp_discounts_the_return_to_go() -> None:
    shown = without_critic([3, 1], [8.0, -1.0])
    batch = targets(shown, estimator="reinforce_pp", gamma=0.5, gae_lambda=0.0)
    assert batch.advantages.tolist() == [[2.0, 4.0, 8.0], [-1.0, 0.0, 0.0]]


def test_on_one_device_gathering_changes_nothing() -> None:
    one = experience([3, 1], [1.0, 0.0], prompt_lengths=[2, 4])
    gathered = one.gathered()
    assert same(targets(one), targets(gathered))


# --- minibatches ---


def row_numbers(batch: TrainingBatch) -> list[int]:
    numbers = (batch.response_ids[:, 0] // 100).tolist()
    assert (batch.prompt_ids[:, -1] // 100).tolist() == numbers  # a row stays together
    assert batch.scores.tolist() == numbers
    return numbers


def numbered(rows: int) -> TrainingBatch:
    lengths = [1 + i % 4 for i in range(rows)]
    return targets(experience(lengths, [float(i + 1) for i in range(rows)]))


def test_minibatches_by_prompt_hold_all_its_responses() -> None:
    batch = numbered(12)
    parts = [row_numbers(part) for part in minibatches(batch, 2, "key", together=3)]
    groups = [[*range(first, first + 3)] for first in (1, 4, 7, 10)]
    assert [len(part) for part in parts] == [6, 6]
    found = [part[start : start + 3] for part in parts for start in (0, 3)]
    assert sorted(found) == groups
    others = [row_numbers(p) for n in range(9) for p in minibatches(batch, 4, n, together=3)]
    assert len({tuple(part) for part in others[::4]}) > 1  # shuffled
    again = [row_numbers(part) for part in minibatches(batch, 2, "key", together=3)]
    assert again == parts


@pytest.mark.parametrize(("rows", "number"), [(12, 4), (10, 4), (5, 1), (3, 3)])
def test_minibatches_hold_every_row_once(rows: int, number: int) -> None:
    parts = [row_numbers(part) for part in minibatches(numbered(rows), number, "key", 1)]
    assert len(parts) == number
    assert sorted(itertools.chain(*parts)) == list(range(1, rows + 1))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_minibatches_depend_on_the_key_alone() -> None:
    batch = numbered(32)

    def order(*key: int | str) -> list[int]:
        return [row for part in minibatches(batch, 4, *key) for row in row_numbers(part)]

    torch.manual_seed(1)
    first = order("key", 1)
    torch.manual_seed(2)
    assert order("key", 1) == first
    assert order("key", 2) != first
    assert first != sorted(first)


# --- trimmed ---


def test_trimming_removes_only_columns_that_every_row_pads() -> None:
    batch = targets(
        experience(
            [2, 3],
            [1.0, 2.0],
            prompt_lengths=[4, 1],
            width=5,
            prompt_width=6,
            values=torch.rand(2, 5),
        )
    )
    cut = batch.trimmed()
    assert cut.prompt_ids.tolist() == [[104, 103, 102, 101], [0, 0, 0, 201]]
    assert cut.prompt_mask.tolist() == [[True] * 4, [False, False, False, True]]
    assert cut.response_ids.tolist() == [[100, 101, 0], [200, 201, 202]]
    assert cut.response_mask.tolist() == [[True, True, False], [True] * 3]
    for name in ("old_logprobs", "values", "rewards", "advantages", "returns"):
        assert torch.equal(getattr(cut, name), getattr(batch, name)[:, :3])
    assert torch.equal(cut.scores, batch.scores) and torch.equal(cut.finished, batch.finished)
    assert cut.ref_logprobs is None
    assert same(cut.trimmed(), cut)


def test_what_the_methods_kept_and_weighed_follows_its_rows() -> None:
    batch = targets(experience([2, 3], [1.0, 2.0], width=5))
    ids = torch.arange(20).view(2, 5, 2)  # two numbers a token
    batch = replace(batch, observed={"m": ids}, weights={"policy": ids[..., 0]})
    second = batch[1:].trimmed()
    assert second.observed["m"].tolist() == [[[10, 11], [12, 13], [14, 15]]]
    assert second.weights["policy"].tolist() == [[10, 12, 14]]


def test_trimming_a_response_that_does_not_count_leaves_a_column() -> None:
    cut = targets(experience([3], [NAN])).trimmed()
    assert cut.response_ids.shape == (1, 1)
    assert not cut.response_mask.any()


def test_the_reference_is_cut_and_split_with_the_rest() -> None:
    ref = torch.arange(8.0).view(2, 4)
    batch = targets(experience([2, 3], [1.0, 2.0], width=4, ref=ref))
    assert torch.equal(batch.trimmed().ref_logprobs, ref[:, :3])
    assert torch.equal(batch[1:].ref_logprobs, ref[1:])
    assert len(batch[1:]) == 1
