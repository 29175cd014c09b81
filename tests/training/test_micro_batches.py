"""Tests of tre_lightning.training.micro_batches."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batches import training_batch
from tre_lightning.batches import Rollout, TrainingBatch
from tre_lightning.training import micro_batches
from tre_lightning.training.micro_batches import (
    PASS_TOKENS,
    PassLimit,
    local_micro_batches,
    packed_plan,
    plan,
)

Lengths = Sequence[int]


def width(rows: Sequence[int], prompts: Lengths, responses: Lengths) -> int:
    """Columns of a pass over these rows."""
    return max(prompts[row] for row in rows) + max(responses[row] for row in rows)


def cost(passes: Sequence[Sequence[int]], prompts: Lengths, responses: Lengths) -> int:
    """Columns that one rank computes, and the price of its passes."""
    return sum(len(rows) * width(rows, prompts, responses) + PASS_TOKENS for rows in passes)


def partitions(rows: Sequence[int]) -> list[list[list[int]]]:
    """All ways to cut a sequence."""
    if not rows:
        return [[]]
    return [
        [list(rows[:end]), *rest]
        for end in range(1, len(rows) + 1)
        for rest in partitions(rows[end:])
    ]


# --- plan ---


def test_rows_of_one_length_share_passes_as_large_as_the_limit() -> None:
    assert plan([6] * 5, [4] * 5, PassLimit(tokens=20)) == [[[0, 1], [2, 3], [4]]]
    assert plan([6] * 5, [4] * 5, PassLimit(rows=3)) == [[[0, 1, 2], [3, 4]]]
    assert plan([6] * 5, [4] * 5, PassLimit()) == [[[0, 1, 2, 3, 4]]]


def test_both_limits_hold() -> None:
    assert plan([6] * 5, [4] * 5, PassLimit(tokens=20, rows=1)) == [[[i] for i in range(5)]]
    assert plan([6] * 5, [4] * 5, PassLimit(tokens=20, rows=4)) == [[[0, 1], [2, 3], [4]]]


def test_a_row_that_is_too_long_has_a_pass_of_its_own() -> None:
    assert plan([5, 5, 5], [1, 500, 2], PassLimit(tokens=20)) == [[[1], [2, 0]]]


def test_short_rows_do_not_share_a_pass_with_long_ones() -> None:
    # Together 4 x 1008 columns, apart 2 x 1008 + 2 x 24.
    assert plan([8] * 4, [16, 1000, 10, 990], PassLimit(tokens=10_000)) == [[[1, 3], [0, 2]]]
    # As long as the padding costs less than a pass, they do.
    assert plan([8] * 4, [16, 20, 10, 14], PassLimit(tokens=10_000)) == [[[1, 0, 3, 2]]]


def test_prompts_are_padded_too() -> None:
    (passes,) = plan([8, 900, 8, 900], [7, 7, 9, 9], PassLimit(rows=2))
    assert sorted(map(sorted, passes)) == [[0, 2], [1, 3]]


def test_without_rows_there_is_no_pass() -> None:
    assert plan([], [], PassLimit(tokens=20), ranks=2) == [[], []]


def test_a_rank_without_a_row_has_an_empty_pass() -> None:
    assert plan([1, 1], [9, 8], PassLimit(tokens=20), ranks=3) == [[[0]], [[1]], [[]]]


lengths = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 300)), min_size=1, max_size=60)
limits = st.builds(
    PassLimit,
    tokens=st.none() | st.integers(1, 3000),
    rows=st.none() | st.integers(1, 20),
)


@given(lengths, limits, st.integers(1, 5))
def test_every_row_once_within_the_limits_on_ranks_of_equal_work(
    rows: list[tuple[int, int]], limit: PassLimit, ranks: int
) -> None:
    prompts, responses = zip(*rows, strict=True)
    shares = plan(prompts, responses, limit, ranks)
    assert shares == plan(prompts, responses, limit, ranks)
    assert sorted(row for share in shares for part in share for row in part) == [*range(len(rows))]
    for together in zip(*shares, strict=True):  # equally many passes
        sizes = [len(part) for part in together]
        assert max(sizes) - min(sizes) <= 1
        for part in filter(None, together):
            assert limit.rows is None or len(part) <= limit.rows
            tokens = len(part) * width(part, prompts, responses)
            assert limit.tokens is None or len(part) == 1 or tokens <= limit.tokens


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 300)), min_size=1, max_size=8),
    st.integers(100, 1500),
)
def test_no_other_cut_of_the_rows_in_this_order_costs_less(
    rows: list[tuple[int, int]], tokens: int
) -> None:
    prompts, responses = zip(*rows, strict=True)
    (passes,) = plan(prompts, responses, PassLimit(tokens=tokens))
    order = [row for part in passes for row in part]
    fitting = [
        cut
        for cut in partitions(order)
        if all(len(p) == 1 or len(p) * width(p, prompts, responses) <= tokens for p in cut)
    ]
    assert cost(passes, prompts, responses) == min(cost(c, prompts, responses) for c in fitting)


def test_ranks_compute_about_equally_many_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.empty(512).geometric_(1 / 47, generator=generator).clamp_(max=256)
    responses = [int(length) for length in drawn]
    prompts = [32] * 512
    shares = plan(prompts, responses, PassLimit(tokens=2048), ranks=4)
    work = [cost(share, prompts, responses) for share in shares]
    assert max(work) / min(work) < 1.03


def test_little_is_padding_where_lengths_are_those_of_real_runs() -> None:
    """A fixed chance to end at each token, as a model with a biased head has."""
    generator = torch.Generator().manual_seed(0)
    for count in (64, 256):  # a minibatch, and the whole rollout
        drawn = torch.empty(count).geometric_(1 / 47, generator=generator).clamp_(max=256)
        responses, prompts = [int(length) for length in drawn], [32] * count
        (passes,) = plan(prompts, responses, PassLimit(tokens=4096))
        computed = cost(passes, prompts, responses) - PASS_TOKENS * len(passes)
        assert 1 - (sum(responses) + sum(prompts)) / computed <= 0.1


# --- plan of packed rows ---


def tokens(rows: Sequence[int], prompts: Lengths, responses: Lengths, named: Lengths) -> int:
    """Of a packed pass: each prompt once."""
    once = {named[row]: prompts[row] for row in rows}
    return sum(once.values()) + sum(responses[row] for row in rows)


def test_packed_rows_of_one_prompt_share_a_pass() -> None:
    named = [0, 1, 2, 0, 1, 2]
    # 10 + 2 x 4 tokens a prompt; with every second one of the second prompt 14 more.
    assert packed_plan([10] * 6, [4] * 6, named, PassLimit(tokens=36)) == [[[0, 3, 1, 4], [2, 5]]]
    assert packed_plan([10] * 6, [4] * 6, named, PassLimit(tokens=35)) == [[[0, 3], [1, 4], [2, 5]]]
    assert packed_plan([10] * 6, [4] * 6, named, PassLimit(rows=3)) == [[[0, 3], [1, 4], [2, 5]]]
    assert packed_plan([10] * 6, [4] * 6, named, PassLimit()) == [[[0, 3, 1, 4, 2, 5]]]


def test_more_rows_of_a_prompt_than_fit_are_cut() -> None:
    assert packed_plan([10] * 4, [4] * 4, [7] * 4, PassLimit(tokens=18)) == [[[0, 1], [2, 3]]]
    assert packed_plan([10] * 3, [9] * 3, [7] * 3, PassLimit(tokens=5)) == [[[0], [1], [2]]]


def test_ranks_share_the_prompts_and_cut_one_where_they_must() -> None:
    named = [0, 0, 1, 1]
    assert packed_plan([10] * 4, [4] * 4, named, PassLimit(), 2) == [[[0, 1]], [[2, 3]]]
    assert packed_plan([10] * 4, [40] * 4, [0] * 4, PassLimit(), 2) == [[[0, 1]], [[2, 3]]]
    # 12 + 1 + 1 tokens and 12 + 1 + 1: a cut inside a prompt would be no better.
    assert packed_plan([12] * 5, [1] * 5, [0, 0, 1, 1, 1], PassLimit(), 2) == [
        [[0, 1]],
        [[2, 3, 4]],
    ]
    assert packed_plan([1], [9], [0], PassLimit(), 2) == [[[]], [[0]]]
    assert packed_plan([], [], [], PassLimit(), 2) == [[], []]


@given(lengths, limits, st.integers(1, 5), st.integers(1, 8))
def test_packed_rows_once_within_the_limits_in_equally_many_passes(
    rows: list[tuple[int, int]], limit: PassLimit, ranks: int, prompt_count: int
) -> None:
    named = [row % prompt_count for row in range(len(rows))]
    prompts = [rows[name][0] for name in named]
    responses = [response for _, response in rows]
    shares = packed_plan(prompts, responses, named, limit, ranks)
    assert sorted(row for share in shares for part in share for row in part) == [*range(len(rows))]
    assert len({len(share) for share in shares}) == 1
    for part in [part for share in shares for part in share if part]:
        assert limit.rows is None or len(part) <= limit.rows
        used = tokens(part, prompts, responses, named)
        assert limit.tokens is None or len(part) == 1 or used <= limit.tokens
    work = [
        tokens([row for part in share for row in part], prompts, responses, named)
        for share in shares
    ]
    longest = max(map(sum, zip(prompts, responses, strict=True)))
    assert max(work) <= sum(work) / ranks + 2 * longest + max(prompts)


# --- of a minibatch ---


def micros_of(batch: TrainingBatch, limit: PassLimit, *unwanted: int) -> list[TrainingBatch]:
    wanted = torch.ones(len(batch), dtype=torch.bool)
    wanted[list(unwanted)] = False
    return local_micro_batches(batch, wanted, limit)


def test_each_rank_gets_its_rows_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = training_batch([[0.1], [0.2] * 900, [0.3] * 3, [0.4] * 890, [0.5] * 2])
    limit = PassLimit(tokens=2000)

    def shapes() -> list[list[list[int]]]:
        return [micro.response_mask.sum(1).tolist() for micro in micros_of(batch, limit)]

    assert shapes() == [[900, 890], [3, 2, 1]]
    found = []
    for rank in range(2):
        monkeypatch.setattr(micro_batches, "world", lambda rank=rank: (rank, 2))
        found.append(shapes())
    assert found == [[[900], [2]], [[890], [3, 1]]]
    for micro in micros_of(batch, limit):
        assert micro.response_ids.shape[1] == micro.response_mask.sum(1).max()


def test_a_rank_without_a_row_computes_one_that_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = training_batch([[0.1, 0.2, 0.3]])
    monkeypatch.setattr(micro_batches, "world", lambda: (1, 2))
    (micro,) = micros_of(batch, PassLimit(tokens=20))
    assert len(micro) == 1 and not micro.response_mask.any()


def test_rows_that_are_not_wanted_are_left_out() -> None:
    batch = training_batch([[0.1], [0.2] * 9, [0.3] * 3])
    (micro,) = micros_of(batch, PassLimit(), 1)
    assert micro.advantages[:, 0].tolist() == pytest.approx([0.3, 0.1])
    (micro,) = micros_of(batch, PassLimit(), 0, 1, 2)  # every rank takes part in a step
    assert len(micro) == 1 and not micro.response_mask.any()


# --- what is padding ---


def test_padding_is_what_no_token_stands_in() -> None:
    prompts = torch.tensor([[False, True], [True, True], [True, True]])
    responses = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    rollout = Rollout(prompts.long(), prompts, responses.long(), responses, responses[:, 0])
    expected = [[1, 0, 0, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]  # the last one does not count
    assert rollout.padding().long().tolist() == expected
    assert not rollout.padding(packed=True).any()  # there is none of it then
    assert rollout[2:].padding(packed=True).all()  # a row for a rank without one
    assert rollout.lengths() == ([1, 2, 2], [3, 1, 1])
