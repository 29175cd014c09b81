"""Tests of tre_lightning.common.metrics."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torchmetrics import ExplainedVariance, Metric

from tre_lightning.common.metrics import (
    MajorityAtK,
    MaskedExplainedVariance,
    MaskedMean,
    PassAtK,
    StandardError,
    cumulative_tail_risk,
    majority_by_prompt,
    number_answers,
    pass_at_k,
    pass_at_k_by_prompt,
)
from tre_lightning.training.diagnostics import EvaluationMetrics, Evaluations
from tre_lightning.training.losses import approx_kl, clipped

NAN, INF = math.nan, math.inf
Update = tuple[Tensor, ...]


def fed(metric: Metric, updates: Sequence[Update]) -> Metric:
    for update in updates:
        metric.update(*update)
    return metric


def value(metric: Metric) -> float:
    return float(metric.compute())


# --- approx_kl ---


def test_approx_kl_by_hand() -> None:
    # r = 2: 2 - 1 - log 2;  r = 1/2: 1/2 - 1 + log 2;  r = 1: 0
    logprobs = torch.tensor([[math.log(0.5), math.log(0.25), -3.0]])
    old = torch.tensor([[math.log(0.25), math.log(0.5), -3.0]])
    expected = torch.tensor([[1 - math.log(2), math.log(2) - 0.5, 0.0]])
    torch.testing.assert_close(approx_kl(logprobs, old), expected)


def test_approx_kl_is_unbiased_for_kl_of_old_from_new() -> None:
    old = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    new = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    estimate = (old * approx_kl(new.log(), old.log())).sum()
    torch.testing.assert_close(estimate, (old * (old / new).log()).sum())


@given(st.floats(-20, 20), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_approx_kl_is_never_negative(log_ratio: float, dtype: torch.dtype) -> None:
    assert approx_kl(torch.tensor(log_ratio, dtype=dtype), torch.zeros((), dtype=dtype)) >= 0


@given(st.floats(1e-7, 1e-3))
def test_approx_kl_of_a_small_step_keeps_its_digits(log_ratio: float) -> None:
    # exp(x) - 1 - x = x^2/2 + x^3/6 + ...; exp(x) in place of expm1 loses all of it below 1e-6
    step = torch.tensor(log_ratio, dtype=torch.float64)
    result = approx_kl(step, torch.zeros_like(step))
    assert float(result) == pytest.approx(log_ratio**2 / 2 + log_ratio**3 / 6, rel=1e-4, abs=1e-22)


def test_approx_kl_upcasts_before_the_difference() -> None:
    # both are exact in bfloat16, their difference is not
    logprobs, old = torch.tensor([-1.5 * 2**-8]), torch.tensor([-4.0])
    expected = approx_kl(logprobs, old)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(approx_kl(logprobs.bfloat16(), old.bfloat16()), expected)
    assert approx_kl(logprobs, old.double()).dtype == torch.float64


# --- cumulative_tail_risk ---


def test_tail_risk_by_hand() -> None:
    tail = torch.tensor([[0.5, 0.25, NAN], [0.1, INF, NAN], [0.5, 0.5, 0.5]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    expected = torch.tensor([1 - 0.5 * 0.75, 0.1, 0.0])
    torch.testing.assert_close(cumulative_tail_risk(tail, mask), expected)


def test_tail_risk_of_certain_and_out_of_range_tails() -> None:
    tail = torch.tensor([[1.0, 0.3], [1.0 + 1e-6, 0.3], [-1e-7, 0.3], [1.0, 1.0]])
    result = cumulative_tail_risk(tail, torch.ones(4, 2, dtype=torch.bool))
    torch.testing.assert_close(result, torch.tensor([1.0, 1.0, 0.3, 1.0]))


@given(st.floats(0, 0.5), st.integers(1, 200))
def test_tail_risk_of_a_constant_tail(tail: float, length: int) -> None:
    masses = torch.full((1, length), tail, dtype=torch.float64)
    risk = cumulative_tail_risk(masses, torch.ones_like(masses, dtype=torch.bool))
    assert float(risk) == pytest.approx(1 - (1 - tail) ** length, abs=1e-12)


def test_tail_risk_keeps_tiny_tails() -> None:
    # 1 - 1e-9 is 1 in float32: a plain product would report no risk at all
    risk = cumulative_tail_risk(torch.full((1, 1000), 1e-9), torch.ones(1, 1000).bool())
    torch.testing.assert_close(risk, torch.tensor([1e-6]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
)
def test_tail_risk_dtype(dtype: torch.dtype, expected: torch.dtype) -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert cumulative_tail_risk(torch.zeros(1, 2, dtype=dtype), mask).dtype == expected


# --- pass_at_k ---


def brute_force(num_correct: int, num_samples: int, k: int) -> float:
    draws = list(itertools.combinations(range(num_samples), k))
    return sum(any(i < num_correct for i in draw) for draw in draws) / len(draws)


@st.composite
def pass_at_k_cases(draw: st.DrawFn) -> tuple[int, int, int]:
    n = draw(st.integers(1, 9))
    return draw(st.integers(0, n)), n, draw(st.integers(1, n))


@given(pass_at_k_cases())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(case: tuple[int, int, int]) -> None:
    c, n, k = case
    result = pass_at_k(torch.tensor([c], dtype=torch.float64), n, k)
    assert result.tolist() == pytest.approx([brute_force(c, n, k)], abs=1e-14)


def test_pass_at_k_of_large_counts() -> None:
    # C(10000, 5000) overflows a float
    n, k = 10_000, 5_000
    counts = torch.tensor([0, 1, 2, n - k, n - k + 1, n])
    two = 1 - (n - k) * (n - k - 1) / (n * (n - 1))
    expected = torch.tensor([0.0, 0.5, two, 1.0, 1.0, 1.0])
    torch.testing.assert_close(pass_at_k(counts, n, k), expected)


def test_pass_at_k_keeps_shape_and_dtype() -> None:
    assert pass_at_k(torch.zeros(2, 3, dtype=torch.int64), 4, 2).shape == (2, 3)
    assert pass_at_k(torch.zeros(1, dtype=torch.int64), 4, 2).dtype == torch.float32
    assert pass_at_k(torch.zeros(0, dtype=torch.float64), 4, 2).dtype == torch.float64


# --- clipped ---


def test_clipped_by_hand() -> None:
    ratio = torch.tensor([[1.3, 1.3, 0.7, 0.7, 1.1, 0.9, 1.3, NAN]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0, 1.0]])
    expected = torch.tensor([[True, False, False, True, False, False, False, False]])
    assert torch.equal(clipped(ratio, advantages, 0.2, 0.2), expected)


def test_clipped_takes_each_bound_on_its_own_side() -> None:
    ratio, advantages = torch.tensor([[1.25, 0.75]]), torch.tensor([[1.0, -1.0]])
    assert clipped(ratio, advantages, 0.2, 0.28).tolist() == [[False, True]]
    assert clipped(ratio, advantages, 0.28, 0.2).tolist() == [[True, False]]


@given(
    st.floats(0.05, 3),
    st.floats(-2, 2).filter(lambda a: abs(a) > 1e-3),
    st.floats(0, 0.9),
    st.floats(0, 0.9),
)
def test_clipped_tokens_are_those_without_gradient(
    ratio: float, advantage: float, low: float, high: float
) -> None:
    if min(abs(ratio - (1 - low)), abs(ratio - (1 + high))) < 1e-9:
        return  # on the edge the gradient is not defined
    r = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(advantage, dtype=torch.float64)
    torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a).backward()
    assert r.grad is not None
    assert bool(clipped(r, a, low, high)) == (float(r.grad) == 0)


# --- every metric ---

FACTORIES: dict[str, Callable[[], Metric]] = {
    "mean": MaskedMean,
    "pass": partial(PassAtK, k=2),
    "majority": MajorityAtK,
    "error": StandardError,
    "variance": MaskedExplainedVariance,
}


def random_updates(name: str, seed: int, count: int) -> list[Update]:
    """Updates of different sizes; seeds share no data."""
    generator = torch.Generator().manual_seed(seed)
    updates: list[Update] = []
    for i in range(count):
        shape = (i + 1, i + 3)
        x, y = torch.randn(2, *shape, generator=generator)
        mask = torch.rand(shape, generator=generator) < 0.7
        if name in ("pass", "majority"):
            scores = (torch.rand(shape, generator=generator) < 0.4).float()
            scores = scores.masked_fill(~mask, NAN)
            answers = torch.randint(-1, 3, shape, generator=generator)
            updates.append((scores,) if name == "pass" else (scores, answers))
        elif name == "error":
            updates.append(((x + i).masked_fill(~mask, NAN).flatten(),))
        else:
            returns = 3 * x + i  # batches differ in mean: averaging their results would be wrong
            guess = 2 * x + y
            updates.append((guess, returns, mask) if name == "variance" else (returns, mask))
    return updates


@pytest.mark.parametrize("name", FACTORIES)
def test_merged_states_equal_one_instance(name: str) -> None:
    new = FACTORIES[name]
    first, second = random_updates(name, 1, 2), random_updates(name, 2, 4)
    merged = fed(new(), first)
    merged.merge_state(fed(new(), second))
    expected = value(fed(new(), first + second))
    assert value(merged) == pytest.approx(expected, rel=1e-12)
    # the halves differ from the whole, or this test could not fail
    assert value(fed(new(), first)) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", FACTORIES)
def test_merging_an_empty_instance_changes_nothing(name: str) -> None:
    new, updates = FACTORIES[name], random_updates(name, 3, 3)
    merged = fed(new(), updates)
    merged.merge_state(new())
    assert value(merged) == value(fed(new(), updates))


@pytest.mark.parametrize("name", FACTORIES)
@settings(max_examples=30)
@given(data=st.data())
def test_chunks_equal_one_update(name: str, data: st.DataObject) -> None:
    *_, update = random_updates(name, data.draw(st.integers(0, 1000)), 6)
    rows = update[0].shape[0]
    cut = data.draw(st.integers(0, rows))
    new = FACTORIES[name]
    pieces = [tuple(x[:cut] for x in update), tuple(x[cut:] for x in update)]
    whole, chunks = value(fed(new(), [update])), value(fed(new(), pieces))
    assert chunks == pytest.approx(whole, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("name", FACTORIES)
def test_forward_returns_the_batch_and_accumulates(name: str) -> None:
    new, updates = FACTORIES[name], random_updates(name, 4, 3)
    metric = new()
    batches = [float(metric(*update)) for update in updates]
    alone = [value(fed(new(), [update])) for update in updates]
    assert batches == pytest.approx(alone, nan_ok=True)
    assert value(metric) == pytest.approx(value(fed(new(), updates)), rel=1e-12)


@pytest.mark.parametrize("name", FACTORIES)
def test_nothing_counted_is_nan(name: str) -> None:
    new = FACTORIES[name]
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert math.isnan(value(new()))
    if name == "pass":
        nothing: list[Update] = [(torch.full((2, 3), NAN),), (torch.zeros(0, 3),)]
    elif name == "majority":
        nothing = [
            (x, torch.zeros_like(x).long()) for x in (torch.full((2, 3), NAN), torch.zeros(0, 3))
        ]
    elif name == "error":
        nothing = [(torch.full((3,), NAN),), (torch.zeros(0),)]
    else:
        count = 2 if name == "variance" else 1
        nothing = [
            (*[torch.full(shape, NAN)] * count, torch.zeros(shape, dtype=torch.bool))
            for shape in [(2, 3), (0, 3), (2, 0)]
        ]
    metric = fed(new(), nothing)
    assert math.isnan(value(metric))
    updates = random_updates(name, 5, 3)
    assert value(fed(metric, updates)) == value(fed(new(), updates))  # and it recovers


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("convert", ["to", "half", "set_dtype"])
def test_states_survive_a_cast_of_the_module(name: str, convert: str) -> None:
    new, updates = FACTORIES[name], random_updates(name, 6, 4)
    metric = fed(new(), updates[:2])
    module = torch.nn.ModuleList([metric])
    casts: dict[str, Callable[[], Any]] = {
        "to": lambda: module.to(torch.bfloat16),
        "half": module.half,
        "set_dtype": lambda: metric.set_dtype(torch.bfloat16),
    }
    casts[convert]()
    assert value(fed(metric, updates[2:])) == value(fed(new(), updates))
    metric.reset()
    dtypes = {s.dtype for s in metric.metric_state.values() if isinstance(s, Tensor)}
    assert dtypes == {torch.float64, torch.int64}


@pytest.mark.parametrize("name", ["mean", "variance"])
@settings(max_examples=30)
@given(data=st.data())
def test_junk_outside_the_mask_does_not_leak(name: str, data: st.DataObject) -> None:
    *_, (*tensors, mask) = random_updates(name, data.draw(st.integers(0, 1000)), 5)
    junk = data.draw(st.sampled_from([NAN, INF, -INF, 1e30]))
    dirty = [torch.where(mask, x, junk) for x in tensors]
    new = FACTORIES[name]
    clean_value = value(fed(new(), [(*tensors, mask)]))
    assert value(fed(new(), [(*dirty, mask)])) == pytest.approx(clean_value, nan_ok=True)
    if mask.sum() > 2:
        assert math.isfinite(clean_value)


# --- MaskedMean ---


def test_masked_mean_weighs_tokens_not_updates() -> None:
    metric = MaskedMean()
    metric.update(torch.tensor([[1.0, 2.0], [9.0, 9.0]]), torch.tensor([[True, True], [False] * 2]))
    metric.update(torch.tensor([6.0]))
    assert value(metric) == 3.0


def test_masked_mean_of_bools_is_their_fraction() -> None:
    ratio, advantages = torch.tensor([[1.5, 1.0, 1.5]]), torch.ones(1, 3)
    metric = MaskedMean()
    metric.update(clipped(ratio, advantages, 0.2, 0.2), torch.tensor([[True, True, False]]))
    assert value(metric) == 0.5


def test_masked_mean_does_not_hide_nan_inside_the_mask() -> None:
    assert math.isnan(value(fed(MaskedMean(), [(torch.tensor([1.0, NAN]),)])))


def test_masked_mean_sums_in_float64() -> None:
    # in float32 1e8 + 1 is 1e8; in bfloat16 256 + 1 is 256
    assert value(fed(MaskedMean(), [(torch.tensor([1e8]),), (torch.ones(3),)])) == 25000000.75
    assert value(fed(MaskedMean(), [(torch.ones(1000, dtype=torch.bfloat16),)] * 3)) == 1.0


def test_masked_mean_keeps_no_graph() -> None:
    metric = fed(MaskedMean(), [])
    assert not metric(torch.ones(2, requires_grad=True)).requires_grad


# --- PassAtK ---


def test_pass_at_k_metric_by_hand() -> None:
    metric = PassAtK(k=2)
    metric.update(torch.tensor([[True, False, False, False], [False] * 4]))  # 1/2, 0
    metric.update(torch.tensor([[1.0, 0.0]]))  # 1; n differs
    assert value(metric) == pytest.approx(1.5 / 3)


def test_pass_at_k_metric_counts_scores_from_one_up() -> None:
    scores = torch.tensor([[1.0, 0.99, 2.5, -1.0]])  # 2 of 4
    assert value(fed(PassAtK(k=1), [(scores,)])) == pytest.approx(0.5)
    integers = torch.tensor([[1, 0, 0, 0]])
    assert value(fed(PassAtK(k=1), [(integers,)])) == pytest.approx(0.25)


def test_pass_at_k_metric_leaves_out_what_was_not_scored() -> None:
    scores = torch.tensor(
        [
            [1.0, 0.0, 0.0, NAN],  # 1 of 3: 1 - C(2,2)/C(3,2) = 2/3
            [1.0, NAN, NAN, NAN],  # fewer than k scored: skipped, although it is correct
            [0.0, 0.0, NAN, NAN],  # 0 of 2: 0
        ]
    )
    assert value(fed(PassAtK(k=2), [(scores,)])) == pytest.approx((2 / 3 + 0) / 2)


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=5, max_size=5), min_size=1),
    st.integers(1, 5),
)
def test_pass_at_k_metric_is_the_mean_of_the_function(rows: list[list[float]], k: int) -> None:
    scored = [[x for x in row if not math.isnan(x)] for row in rows]
    each = [brute_force(int(sum(row)), len(row), k) for row in scored if len(row) >= k]
    expected = sum(each) / len(each) if each else NAN
    assert value(fed(PassAtK(k), [(torch.tensor(rows),)])) == pytest.approx(expected, nan_ok=True)


def test_pass_at_k_of_each_prompt_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0, NAN], [NAN, NAN, 1.0], [0.0, 0.5, 0.0]])
    first, second, third = pass_at_k_by_prompt(scores, 2).tolist()
    assert (first, third) == (1.0, 0.0) and math.isnan(second)


# --- MajorityAtK ---


def majority(scores: Sequence[float], answers: Sequence[str | None]) -> float:
    numbers = number_answers(answers, len(answers))
    return float(majority_by_prompt(torch.tensor([scores]), numbers)[0])


@pytest.mark.parametrize(
    ("scores", "answers", "expected"),
    [
        ([1.0, 1.0, 0.0, 0.0, 0.0], ["5", "5", "6", "7", "8"], 1.0),  # most votes, not most wrong
        ([1.0, 0.0, 0.0, 0.0], ["5", "6", "6", "7"], 0.0),
        ([1.0, 0.0, 0.0, 0.0], ["5", None, None, None], 1.0),  # no answer is no vote
        ([0.0, 0.0], [None, None], 0.0),  # nobody votes
        ([1.0, 1.0], [None, None], 0.0),  # not even for what scores
        ([1.0, 1.0, 0.0, 0.0, 0.0], ["5", "5", "6", "6", "7"], 0.5),  # a tie of two
        ([1.0, 0.0, 0.0], ["5", "6", "7"], 1 / 3),  # a tie of three
        ([1.0, 1.0, 0.0, 0.0, NAN], ["5", "5", "6", "6", "6"], 0.5),  # NaN leaves the vote
        ([NAN, NAN, 1.0], ["6", "6", "5"], 1.0),
        ([1.0, NAN], [None, "6"], 0.0),
        ([2.0, 4.0, 9.0], ["5", "5", "6"], 3.0),  # an answer's score is its responses' mean
        ([NAN, NAN], ["5", None], NAN),  # no response could be scored
    ],
)
def test_majority_by_hand(scores: list[float], answers: list[str | None], expected: float) -> None:
    assert majority(scores, answers) == pytest.approx(expected, nan_ok=True)


def test_majority_metric_is_the_mean_over_prompts() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [NAN, NAN, NAN]])
    answers = number_answers(["5", "5", "6", "7", "7", "5", "5", "5", "5"], 3)
    metric = fed(MajorityAtK(), [(scores, answers), (torch.ones(2, 1), torch.zeros(2, 1).long())])
    assert value(metric) == pytest.approx((1 + 0 + 1 + 1) / 4)  # the third prompt is skipped


def test_answers_are_numbered_within_their_prompt() -> None:
    numbers = number_answers(["b", None, "a", "b", "a", "a", "c", None], 4)
    assert numbers.tolist() == [[0, -1, 1, 0], [0, 0, 1, -1]]
    assert number_answers([], 4).shape == (0, 4)


VOTES = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, 0.5, NAN]), st.sampled_from([None, "5", "6", "7"])),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100)
@given(VOTES)
def test_majority_is_what_a_count_of_votes_says(rows: list[tuple[float, str | None]]) -> None:
    votes: dict[str, list[float]] = {}
    for score, answer in rows:
        if answer is not None and not math.isnan(score):
            votes.setdefault(answer, []).append(score)
    most = max(map(len, votes.values()), default=0)
    means = [sum(given) / most for given in votes.values() if len(given) == most]
    expected = sum(means) / len(means) if means else 0.0
    if all(math.isnan(score) for score, _ in rows):
        expected = NAN
    assert majority(*zip(*rows, strict=True)) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=50)
@given(st.data(), VOTES)
def test_majority_knows_no_order_of_the_responses(
    data: st.DataObject, rows: list[tuple[float, str | None]]
) -> None:
    shuffled = data.draw(st.permutations(rows))
    expected = majority(*zip(*rows, strict=True))
    assert majority(*zip(*shuffled, strict=True)) == pytest.approx(expected, nan_ok=True)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=6))
def test_majority_of_one_answer_is_the_mean_score(scores: list[float]) -> None:
    assert majority(scores, ["5"] * len(scores)) == pytest.approx(sum(scores) / len(scores))


# --- StandardError ---


def standard_error(*values: float) -> float:
    return value(fed(StandardError(), [(torch.tensor(values),)]))


def test_standard_error_by_hand() -> None:
    # mean 2, squared deviations 1, 0, 1: variance 2 / 2, over 3 prompts
    assert standard_error(1, 2, 3) == pytest.approx(math.sqrt(1 / 3))
    assert standard_error(1, NAN, 2, 3) == pytest.approx(math.sqrt(1 / 3))
    assert standard_error(0, 1) == pytest.approx(0.5)
    assert standard_error(1, 1, 1) == 0
    assert math.isnan(standard_error(1, NAN))


@settings(max_examples=50)
@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=20), st.sampled_from([0, 1000]))
def test_standard_error_is_sd_over_root_n(values: list[float], offset: int) -> None:
    moved = torch.tensor(values, dtype=torch.float64) + offset
    expected = float(moved.std() / math.sqrt(len(values)))
    assert value(fed(StandardError(), [(moved,)])) == pytest.approx(expected, abs=1e-5)


# --- EvaluationMetrics ---

LENGTHS = torch.tensor([1, 2, 3, 3, 3, 3, 1, 1, 1])
EVALUATED = {
    "scores": torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, NAN, NAN]),  # three prompts
    "response_mask": torch.arange(4) < LENGTHS.unsqueeze(1),
    "finished": LENGTHS < 3,
    "invalid": LENGTHS == 2,
}
ANSWERS = ["5", "5", "6", "7", "7", "8", None, "9", "9"]


def evaluate(metrics: EvaluationMetrics, *rows: slice) -> dict[str, float]:
    for some in rows:
        metrics.update(
            **{name: x[some] for name, x in EVALUATED.items()},
            answers=ANSWERS[some],
            standard_errors=True,
        )
    return {tag: float(x) for tag, x in metrics.flush().items()}


def test_evaluation_by_hand() -> None:
    metrics = EvaluationMetrics(num_responses=3)
    expected = {
        "score": 3 / 7,  # of the scored responses
        "score_se": 1 / 3 / math.sqrt(3),  # of 2/3, 1/3, 0
        "pass@1": 1 / 3,
        "pass@1_se": 1 / 3 / math.sqrt(3),
        "pass@3": 1.0,  # the third prompt has too few scores
        "pass@3_se": 0.0,
        "majority@3": 1 / 3,
        "majority@3_se": math.sqrt(1 / 3 / 3),  # of 1, 0, 0
        "response_length": 2.0,
        "response_length_se": 1 / math.sqrt(3),  # of 2, 3, 1
        "finished_fraction": 5 / 9,
        "invalid_fraction": 1 / 9,
    }
    assert evaluate(metrics, slice(3), slice(3, 9)) == pytest.approx(expected)
    assert evaluate(metrics, slice(9)) == pytest.approx(expected)  # and flush has emptied it


def test_a_single_prompt_has_no_standard_error() -> None:
    found = evaluate(EvaluationMetrics(num_responses=3), slice(3))
    means = {"score", "pass@1", "pass@3", "majority@3", "response_length"}
    assert found.keys() == means | {"finished_fraction", "invalid_fraction"}


def test_a_task_without_right_and_answers_has_its_scores_alone() -> None:
    metrics = EvaluationMetrics(num_responses=3)
    metrics.update(**EVALUATED, binary=False)
    shares = {"finished_fraction", "invalid_fraction"}
    assert metrics.flush().keys() == {"score", "response_length", *shares}


def test_sets_are_evaluated_apart() -> None:
    evaluations = Evaluations(num_responses=3)
    for split, some in (("val", slice(3)), ("val_file", slice(3, 6)), ("val", slice(6, 9))):
        part = {name: x[some] for name, x in EVALUATED.items()}
        evaluations.of(split, torch.device("cpu")).update(**part)
    values = {tag: float(x) for tag, x in evaluations.flush().items()}
    assert values["val/score"] == pytest.approx(2 / 4)
    assert values["val_file/score"] == pytest.approx(1 / 3)
    assert evaluations.flush() == {}


# --- MaskedExplainedVariance ---


def explained_variance(values: Sequence[float], returns: Sequence[float]) -> float:
    rows = torch.tensor([values]), torch.tensor([returns])
    mask = torch.ones(1, len(values), dtype=torch.bool)
    return value(fed(MaskedExplainedVariance(), [(*rows, mask)]))


def test_explained_variance_by_hand() -> None:
    # returns 1, 2, 3: variance 2/3; errors 0, 0, 1: variance 1/3 - 1/9 = 2/9
    assert explained_variance([1, 2, 2], [1, 2, 3]) == pytest.approx(2 / 3)
    assert explained_variance([6, 7, 8], [1, 2, 3]) == pytest.approx(1)  # off by a constant
    assert explained_variance([7, 7, 7], [1, 2, 3]) == pytest.approx(0)
    assert explained_variance([3, 2, 1], [1, 2, 3]) == pytest.approx(-3)  # worse than a constant


@given(st.floats(0.1, 3), st.integers(2, 12))
@example(0.7, 7)
def test_explained_variance_never_exceeds_one(error: float, count: int) -> None:
    # a critic off by a constant: rounding can leave its error variance just below 0
    returns = torch.arange(count, dtype=torch.float64).fmod(2).div(2).unsqueeze(0)
    mask = torch.ones_like(returns, dtype=torch.bool)
    assert value(fed(MaskedExplainedVariance(), [(returns - error, returns, mask)])) <= 1


@given(st.integers(0, 1000), st.sampled_from([0.0, 1e4, -1e4]))
@settings(max_examples=30)
def test_explained_variance_agrees_with_torchmetrics(seed: int, offset: float) -> None:
    updates = [
        (values + offset, returns + offset, mask)
        for values, returns, mask in random_updates("variance", seed, 5)
    ]
    reference = ExplainedVariance()
    preds, target = (torch.cat([u[i][u[2]] for u in updates]).double() for i in (0, 1))
    # its sums start as float32: without the offset, which variance ignores, they are exact enough
    expected = float(reference(preds - offset, target - offset))
    assert value(fed(MaskedExplainedVariance(), updates)) == pytest.approx(expected, abs=1e-6)


def test_explained_variance_of_constant_returns_is_nan() -> None:
    assert math.isnan(explained_variance([1, 2, 3], [0, 0, 0]))
    assert math.isnan(explained_variance([0.1] * 7, [0.1] * 7))
    # a constant return of 1 in float32: the last one is off by a rounding
    assert math.isnan(explained_variance([0.3, 0.4, 0.2], [1, 1, 1 - 2**-24]))


def test_explained_variance_of_constant_returns_is_nan_however_long_the_run() -> None:
    # 10,000 rounded additions of 0.1 leave a variance of about 1e-13, not 0
    metric = MaskedExplainedVariance()
    mask = torch.ones(1, 1, dtype=torch.bool)
    for i in range(10_000):
        metric.update(torch.tensor([[float(i % 3)]]), torch.tensor([[0.1]]), mask)
    assert math.isnan(value(metric))


def test_explained_variance_of_returns_too_close_for_float64_sums_is_nan() -> None:
    # one return of 1 + 2^-18 among 2^20: its square's 2^-36 is lost, the variance is exactly 0
    returns = torch.ones(1, 2**20)
    returns[0, 0] += 2**-18
    update = (torch.arange(2**20).float().unsqueeze(0), returns, returns > 0)
    assert math.isnan(value(fed(MaskedExplainedVariance(), [update])))


def test_explained_variance_counts_a_constant_per_run_not_per_update() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    updates = [(torch.full((1, 2), x), torch.full((1, 2), x), mask) for x in (1.0, 2.0)]
    assert value(fed(MaskedExplainedVariance(), updates)) == pytest.approx(1)


def test_explained_variance_shows_nan_inside_the_mask() -> None:
    assert math.isnan(explained_variance([1, NAN, 2], [1, 2, 3]))
    assert math.isnan(explained_variance([1, 2, 2], [1, NAN, 3]))


# --- bad input ---

ONES, COUNTS, MASK = torch.ones(2, 2), torch.tensor([1]), torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: approx_kl(ONES, ONES[0]), r"old_logprobs has shape \[2\]; pass \[2, 2\]"),
        (
            lambda: cumulative_tail_risk(ONES, ONES.long()),
            r"response_mask is torch\.int64; pass torch\.bool",
        ),
        (lambda: cumulative_tail_risk(ONES, MASK[0]), r"response_mask has shape \[2\]"),
        (lambda: pass_at_k(COUNTS, 4, 5), "k=5 exceeds num_samples=4"),
        (lambda: pass_at_k(COUNTS, 4, 0), "k=0 draws no response"),
        (
            lambda: pass_at_k(5 * COUNTS, 4, 1),
            r"num_correct spans 5 to 5; pass counts in \[0, num_samples=4\]",
        ),
        (lambda: pass_at_k(-COUNTS, 4, 1), "num_correct spans -1 to -1"),
        (lambda: clipped(ONES, ONES[0], 0.2, 0.2), r"advantages has shape \[2\]"),
        (lambda: clipped(ONES, ONES, -0.2, 0.2), r"clip_eps_low=-0\.2"),
        (lambda: clipped(ONES, ONES, 0.2, NAN), "clip_eps_high=nan"),
        (lambda: MaskedMean().update(ONES, ONES), r"mask is torch\.float32"),
        (lambda: MaskedMean().update(ONES, MASK[0]), r"mask has shape \[2\]; pass \[2, 2\]"),
        (lambda: PassAtK(k=0), "k=0 draws no response"),
        (
            lambda: PassAtK(k=2).update(ONES[0]),
            r"scores has shape \[2\]; pass \[prompts, responses\]",
        ),
        (lambda: PassAtK(k=4).update(ONES), "scores has 2 responses per prompt; pass@4"),
        (
            lambda: MajorityAtK().update(ONES, torch.zeros(4, 1)),
            r"answers has shape \[4, 1\]; pass \[2, 2\], as scores",
        ),
        (
            lambda: MajorityAtK().update(ONES[0], ONES[0]),
            r"scores has shape \[2\]; pass \[prompts, responses\]",
        ),
        (
            lambda: number_answers(["5", None, "6"], 2),
            "3 answers are no multiple of num_responses=2",
        ),
        (
            lambda: MaskedExplainedVariance().update(ONES, ONES[0], MASK),
            r"returns has shape \[2\]; pass \[2, 2\], as values has",
        ),
        (lambda: MaskedExplainedVariance().update(ONES, ONES, ONES), r"mask is torch\.float32"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- two processes ---

RANK_UPDATES = (2, 5)  # updates each rank feeds: unequal amounts of unequal data


def sync_worker(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(RANK_UPDATES)
    )
    results: dict[str, float] = {}
    for name, new in FACTORIES.items():
        updates = random_updates(name, rank, RANK_UPDATES[rank])
        metric = fed(new(), updates)
        results[f"{name} synced"] = value(metric)
        results[f"{name} after one more"] = value(fed(metric, updates[:1]))
        one_sided = new()
        torch.nn.ModuleList([one_sided]).to(torch.bfloat16)  # must not part the ranks' dtypes
        results[f"{name} from rank 1 alone"] = value(fed(one_sided, updates if rank else []))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_compute_what_one_would(tmp_path: Path) -> None:
    spawn(sync_worker, args=(str(tmp_path),), nprocs=len(RANK_UPDATES))
    expected = {}
    for name, new in FACTORIES.items():
        ranks = [random_updates(name, rank, count) for rank, count in enumerate(RANK_UPDATES)]
        everything = [*ranks[0], *ranks[1]]
        again = [*everything, ranks[0][0], ranks[1][0]]
        expected[f"{name} synced"] = value(fed(new(), everything))
        expected[f"{name} after one more"] = value(fed(new(), again))
        expected[f"{name} from rank 1 alone"] = value(fed(new(), ranks[1]))
        for updates in ranks:  # or a metric that does not sync would pass
            alone = value(fed(new(), updates))
            assert alone != pytest.approx(expected[f"{name} synced"], rel=1e-3)
    for rank in range(len(RANK_UPDATES)):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected, rel=1e-9)


def test_explained_variance_of_returns_that_only_round_is_nan() -> None:
    # returns are sums of values: where every score is 0 they are rounding noise around 0
    metric = MaskedExplainedVariance()
    values, returns = torch.tensor([[0.4, -0.3]]), torch.tensor([[1e-9, -2e-9]])
    metric.update(values, returns, torch.ones(1, 2, dtype=torch.bool))
    assert metric.compute().isnan()
