"""Tests of tre_lightning.entropy."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper

from tre_lightning.entropy import (
    check_region,
    entropy_stats,
    full_entropy,
    trust_region_entropy,
    trust_region_mask,
)

INF = math.inf


# --- an independent implementation: one row, Python floats ---


def softmax(row: Sequence[float]) -> list[float]:
    weights = [math.exp(z - max(row)) for z in row]
    return [w / math.fsum(weights) for w in weights]


def brute_region(
    row: Sequence[float],
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> list[int]:
    """Token ids by falling logit, the lower id first; tokens at -inf are left out."""
    order = sorted((-z, i) for i, z in enumerate(row) if z > -INF)
    ids = [i for _, i in order]
    if top_k is not None:
        return ids[:top_k]
    p, size, mass = softmax(row), 0, 0.0
    if min_p is not None:
        return [i for i in ids if p[i] >= min_p * max(p)]
    while mass < top_p and size < len(ids):
        mass += p[ids[size]]
        size += 1
    return ids[:size]


def assume_no_rounding(
    row: Sequence[float], top_p: float | None = None, min_p: float | None = None, **_: int
) -> None:
    """Leave out a region whose edge comes so close to a token that rounding decides."""
    p = sorted(softmax(row), reverse=True)
    assume(top_p is None or min(abs(mass - top_p) for mass in itertools.accumulate(p)) > 1e-5)
    assume(min_p is None or min(abs(x / p[0] - min_p) for x in p) > 1e-5)


def brute_entropy(row: Sequence[float], region: Sequence[int]) -> float:
    q = softmax([row[i] for i in region])
    return -math.fsum(x * math.log(x) for x in q if x > 0)


def brute_scale(row: Sequence[float], region: Sequence[int]) -> float:
    return math.log(len(row)) / math.log(len(region)) if len(region) > 1 else 0.0


def ids_of(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


# Few levels make ties; quarters stay exact when a constant is added.
tied = st.sampled_from([-INF, -2.0, 0.0, 0.5, 1.0, 3.0])
free = st.integers(-40, 40).map(lambda n: n / 4)
rows = st.one_of(
    st.lists(tied, min_size=1, max_size=12),
    st.lists(free, min_size=1, max_size=12),
    st.lists(st.one_of(tied, free), min_size=1, max_size=12),
).filter(lambda row: max(row) > -INF)
regions = st.one_of(
    st.fixed_dictionaries({"top_k": st.integers(1, 14)}),
    st.fixed_dictionaries({"top_p": st.floats(0.01, 0.999)}),
    st.fixed_dictionaries({"min_p": st.floats(1e-4, 0.999)}),
)


# --- reference values of the paper's vocabulary ---


def long_tail(p2: float, size: int = 151936) -> Tensor:
    """Top token 1 - p2, second p2 * (1 - 1e-3), the rest spread evenly."""
    p = torch.full((size,), 1e-3 * p2 / (size - 2), dtype=torch.float64)
    p[0], p[1] = 1 - p2, p2 * (1 - 1e-3)
    return p.log().float()


@pytest.mark.parametrize(
    ("p2", "full", "top_2", "top_99"),
    [(0.0099, 0.0557, 0.9553, 0.0), (0.05, 0.1995, 3.4147, 3.4147)],
)
def test_reference_values(p2: float, full: float, top_2: float, top_99: float) -> None:
    logits = long_tail(p2)
    assert full_entropy(logits).item() == pytest.approx(full, abs=1e-4)
    assert trust_region_entropy(logits, top_k=2).item() == pytest.approx(top_2, abs=1e-4)
    nucleus = trust_region_entropy(logits, top_p=0.99).item()
    assert nucleus == pytest.approx(top_99, abs=1e-4)
    if top_99 == 0.0:
        assert nucleus == 0.0
    stats = entropy_stats(logits, top_k=2)
    assert stats.full.item() == pytest.approx(full, abs=1e-4)
    assert stats.scaled.item() == pytest.approx(top_2, abs=1e-4)
    assert stats.tail_mass.item() == pytest.approx(1e-3 * p2, rel=1e-3)


# --- the region ---


@pytest.mark.parametrize(
    ("top_p", "ids"), [(0.49, [0]), (0.51, [0, 2]), (0.79, [0, 2]), (0.81, [0, 1, 2])]
)
def test_the_nucleus_includes_the_token_that_crosses(top_p: float, ids: list[int]) -> None:
    logits = torch.tensor([0.5, 0.2, 0.3]).log()
    assert ids_of(trust_region_mask(logits, top_p=top_p)) == ids


@pytest.mark.parametrize(
    ("region", "ids"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_p": 0.35}, [1]),  # two tokens of 0.4, two of 0.1
        ({"top_p": 0.45}, [1, 3]),
        ({"top_p": 0.85}, [0, 1, 3]),
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        ({"min_p": 0.999999}, [1, 3]),  # equally probable tokens enter together
        ({"min_p": 0.26}, [1, 3]),
        ({"min_p": 0.24}, [0, 1, 2, 3]),
    ],
)
def test_ties_go_to_the_lower_token_id(region: dict[str, float], ids: list[int]) -> None:
    logits = torch.tensor([0.1, 0.4, 0.1, 0.4]).log()
    assert ids_of(trust_region_mask(logits, **region)) == ids


def test_rows_with_and_without_ties_do_not_mix() -> None:
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]], [[1.0] * 4, [0, 3, 1, 2]]])
    mask = trust_region_mask(logits, top_k=2)
    assert [[ids_of(row) for row in page] for page in mask] == [[[0, 1], [1, 2]], [[0, 1], [1, 3]]]


@pytest.mark.parametrize(
    ("min_p", "kept"),
    [(0.9, [0.5]), (0.61, [0.5]), (0.59, [0.5, 0.3]), (0.21, [0.5, 0.3]), (0.19, [0.5, 0.3, 0.1])],
)
def test_min_p_is_a_fraction_of_the_largest_probability(min_p: float, kept: list[float]) -> None:
    p = [0.04, 0.3, 0.1, 0.5, 0.06]
    logits = torch.tensor(p).log() + 3.0
    assert ids_of(trust_region_mask(logits, min_p=min_p)) == sorted(p.index(x) for x in kept)
    stats = entropy_stats(logits, min_p=min_p)
    assert stats.size.item() == len(kept)
    assert stats.tail_mass.item() == pytest.approx(1 - sum(kept), abs=1e-6)
    plain = -sum(x / sum(kept) * math.log(x / sum(kept)) for x in kept)
    scale = math.log(5) / math.log(len(kept)) if len(kept) > 1 else 0.0
    value = trust_region_entropy(logits, min_p=min_p)
    assert value.item() == pytest.approx(scale * plain, abs=1e-6)


@pytest.mark.parametrize("gap", [0.5, 0.25, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_token_at_the_edge_of_min_p_is_in(gap: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([0.0, -gap, -gap, -gap - 0.25, -INF], dtype=dtype)
    assert ids_of(trust_region_mask(logits, min_p=math.exp(-gap))) == [0, 1, 2]


@pytest.mark.parametrize("min_p", [1 - 1e-16, 1e-300, 5e-324])
def test_min_p_at_the_ends_of_its_range(min_p: float) -> None:
    logits = torch.tensor([[7e4, 3.0, -INF, -7e4], [-300.0, -310.0, -620.0, -305.0]])
    ids = [ids_of(row) for row in trust_region_mask(logits, min_p=min_p)]
    assert ids == ([[0], [0]] if min_p > 0.5 else [[0], [0, 1, 2, 3]])
    assert trust_region_entropy(logits, min_p=min_p).isfinite().all()


@given(rows, st.floats(1e-4, 0.999))
def test_min_p_is_that_of_min_p_sampling(row: list[float], min_p: float) -> None:
    assume_no_rounding(row, min_p=min_p)
    logits = torch.tensor([row])
    left = MinPLogitsWarper(min_p)(torch.zeros(1, 1, dtype=torch.long), logits) > -INF
    assert torch.equal(trust_region_mask(logits, min_p=min_p), left)


@given(rows, regions)
@settings(max_examples=400)
def test_equal_to_brute_force(row: list[float], region: dict[str, float]) -> None:
    assume_no_rounding(row, **region)
    expected = brute_region(row, **region)
    entropy, scale = brute_entropy(row, expected), brute_scale(row, expected)
    everything = [i for i, z in enumerate(row) if z > -INF]
    p = softmax(row)
    tail = math.fsum(x for i, x in enumerate(p) if i not in expected)
    logits = torch.tensor(row)

    assert ids_of(trust_region_mask(logits, **region)) == sorted(expected)
    plain = trust_region_entropy(logits, **region, rescale=False)
    scaled = trust_region_entropy(logits, **region)
    stats = entropy_stats(logits, **region)
    close = {"abs": 2e-5}
    assert plain.item() == pytest.approx(entropy, **close)
    assert scaled.item() == pytest.approx(scale * entropy, **close)
    assert full_entropy(logits).item() == pytest.approx(brute_entropy(row, everything), **close)
    assert stats.size.item() == len(expected) and stats.size.dtype == torch.int64
    assert stats.scale.item() == pytest.approx(scale, rel=1e-6)
    assert stats.tail_mass.item() == pytest.approx(tail, abs=1e-6)
    assert stats.region.item() == pytest.approx(entropy, **close)
    assert stats.scaled.item() == pytest.approx(scale * entropy, **close)
    assert stats.full.item() == pytest.approx(brute_entropy(row, everything), **close)


@given(rows, st.floats(0.01, 0.999))
def test_the_nucleus_is_large_enough_and_no_larger(row: list[float], top_p: float) -> None:
    p = torch.tensor(row, dtype=torch.float64).softmax(-1)
    inside = p[trust_region_mask(torch.tensor(row), top_p=top_p)]
    assert inside.sum().item() > top_p - 1e-6
    assert (inside.sum() - inside.min()).item() < top_p + 1e-6


@pytest.mark.parametrize("possible", [12, 48, 64, 65, 199, 500])
@pytest.mark.parametrize("impossible", [0, 7])
def test_top_p_near_1_takes_every_possible_token_and_no_more(
    possible: int, impossible: int
) -> None:
    # The sum of rounded probabilities may stay below top_p.
    logits = torch.zeros(2, impossible + possible)
    logits[:, :impossible] = -INF
    scale = math.log(impossible + possible) / math.log(possible)
    stats = entropy_stats(logits, top_p=1 - 1e-9)
    mask = trust_region_mask(logits, top_p=1 - 1e-9)
    assert stats.size.tolist() == [possible] * 2
    torch.testing.assert_close(stats.scale, torch.full((2,), scale))
    assert torch.equal(mask, logits == 0)


# --- wide nuclei ---


@pytest.mark.parametrize("size", [62, 63, 64, 65, 66, 100, 128, 199])
def test_the_nucleus_is_exact_around_and_beyond_the_first_look(size: int) -> None:
    # 200 equal tokens: (size - 0.5) / 200 is reached within token number `size`.
    stats = entropy_stats(torch.zeros(200), top_p=(size - 0.5) / 200)
    assert stats.size.item() == size
    assert stats.region.item() == pytest.approx(math.log(size), rel=1e-5)
    assert ids_of(trust_region_mask(torch.zeros(200), top_p=(size - 0.5) / 200)) == [*range(size)]


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
def test_nuclei_of_3000_tokens_equal_brute_force(top_p: float) -> None:
    torch.manual_seed(0)
    temperatures = torch.tensor([[0.1, 0.5, 1.0], [2.0, 4.0, 1.0]]).unsqueeze(-1)
    # float64: among so many tokens, rounding would decide at the edge.
    logits = 2 * torch.randn(2, 3, 3000, dtype=torch.float64) / temperatures
    logits[0, 2] = (logits[0, 2] * 2).round() / 2  # ties
    logits[1, 2, 100:] = -INF
    stats = entropy_stats(logits, top_p=top_p)
    mask = trust_region_mask(logits, top_p=top_p)
    value = trust_region_entropy(logits, top_p=top_p)
    sizes = []
    for b in range(2):
        for t in range(3):
            row = logits[b, t].tolist()
            region = brute_region(row, top_p=top_p)
            sizes.append(len(region))
            assert ids_of(mask[b, t]) == sorted(region)
            assert stats.size[b, t] == len(region)
            scaled = brute_scale(row, region) * brute_entropy(row, region)
            assert value[b, t].item() == pytest.approx(scaled, abs=1e-4)
            assert stats.scaled[b, t].item() == pytest.approx(scaled, abs=1e-4)
    assert min(sizes) <= 64 < max(sizes)  # both searches took part


def test_a_single_row_needs_no_batch_axis() -> None:
    torch.manual_seed(0)
    logits = torch.randn(500)
    for region in ({"top_k": 3}, {"top_p": 0.95}, {"min_p": 0.1}):
        one = trust_region_entropy(logits, **region)
        assert one.shape == ()
        batched = trust_region_entropy(logits[None, None], **region)
        torch.testing.assert_close(batched, one[None, None])


# --- properties ---


@given(rows, regions)
def test_scaled_entropy_lies_between_0_and_log_v(
    row: list[float], region: dict[str, float]
) -> None:
    logits = torch.tensor(row)
    for value in (
        trust_region_entropy(logits, **region),
        full_entropy(logits),
        entropy_stats(logits, **region).scaled,
    ):
        assert -1e-6 <= value.item() <= math.log(len(row)) + 1e-5


@given(st.integers(3, 300), st.data(), st.sampled_from([0.0, -7.25, 40.0]))
def test_uniform_logits_give_log_v_whatever_the_region(
    vocabulary: int, data: st.DataObject, level: float
) -> None:
    logits = torch.full((vocabulary,), level)
    top_k = data.draw(st.integers(2, vocabulary + 2))
    top_p = data.draw(st.floats(1.01 / vocabulary, 0.999))
    for region in ({"top_k": top_k}, {"top_p": top_p}, {"min_p": top_p}):
        value = trust_region_entropy(logits, **region).item()
        assert value == pytest.approx(math.log(vocabulary), rel=1e-5)


@given(rows, regions, st.integers(-200, 200).map(lambda n: n / 4))
def test_adding_a_constant_changes_nothing(
    row: list[float], region: dict[str, float], constant: float
) -> None:
    assume_no_rounding(row, **region)
    logits = torch.tensor(row, dtype=torch.float64)
    moved = logits + constant
    assert torch.equal(trust_region_mask(moved, **region), trust_region_mask(logits, **region))
    torch.testing.assert_close(
        trust_region_entropy(moved, **region), trust_region_entropy(logits, **region)
    )
    torch.testing.assert_close(full_entropy(moved), full_entropy(logits))


@pytest.mark.parametrize("top_k", [40, 41, 1000])
def test_top_k_of_the_whole_vocabulary_is_the_full_entropy(top_k: int) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 40)
    torch.testing.assert_close(trust_region_entropy(logits, top_k=top_k), full_entropy(logits))
    assert trust_region_mask(logits, top_k=top_k).all()


# --- edges of the input ---


@pytest.mark.parametrize("region", [{"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.5}])
@pytest.mark.parametrize("rescale", [True, False])
def test_a_region_of_one_token_is_exactly_0_with_a_finite_zero_gradient(
    region: dict[str, float], rescale: bool
) -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0], [-5.0, 2.0, -INF]], requires_grad=True)
    value = trust_region_entropy(logits, **region, rescale=rescale)
    assert value.tolist() == [0.0, 0.0]
    value.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(2, 3))
    stats = entropy_stats(logits, **region)
    assert stats.size.tolist() == [1, 1]
    assert stats.region.tolist() == stats.scaled.tolist() == stats.scale.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_type_with_impossible_tokens_gives_finite_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (20 * torch.randn(4, 300)).to(dtype)
    logits[0, 5:] = -INF
    logits[1, ::2] = -INF
    logits[2] = 0.0
    logits[3, 0] = 6e4  # near the largest float16
    for region in ({"top_k": 2}, {"top_k": 200}, {"top_p": 0.99}, {"min_p": 1e-5}):
        leaf = logits.clone().requires_grad_()
        value = trust_region_entropy(leaf, **region)
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        # The type of the input costs no precision: the result is that of its exact values.
        exact = trust_region_entropy(logits.double(), **region)
        torch.testing.assert_close(value.double(), exact, atol=1e-5, rtol=1e-5)
        (value.sum() + full_entropy(leaf).sum()).backward()
        assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all()
        assert not trust_region_mask(logits, **region)[logits == -INF].any()
        stats = entropy_stats(logits, **region)
        assert all(part.isfinite().all() for part in stats)
        torch.testing.assert_close(stats.scaled, value, atol=1e-5, rtol=1e-5)
    assert full_entropy(logits).dtype == torch.float32


def test_float64_stays() -> None:
    logits = torch.randn(2, 5, dtype=torch.float64)
    stats = entropy_stats(logits, top_k=2)
    assert trust_region_entropy(logits, top_k=2).dtype == torch.float64
    assert full_entropy(logits).dtype == stats.region.dtype == torch.float64


@pytest.mark.parametrize(
    "region", [{"top_k": k} for k in (1, 2, 3, 4)] + [{"top_p": 0.9}, {"min_p": 0.3}]
)
@pytest.mark.parametrize("bad", [[math.nan, 1.0, 2.0, 2.0], [-INF] * 4])
def test_an_undefined_row_gives_nan_and_leaves_the_others_alone(
    bad: list[float], region: dict[str, float]
) -> None:
    good = [0.0, 0.5, 1.0, 1.0]
    logits = torch.tensor([bad, good])
    for values in (
        trust_region_entropy(logits, **region),
        full_entropy(logits),
        entropy_stats(logits, **region).region,
        entropy_stats(logits, **region).scaled,
        entropy_stats(logits, **region).full,
    ):
        assert values.isnan().tolist() == [True, False]
    assert trust_region_entropy(logits, **region)[1] == trust_region_entropy(
        torch.tensor(good), **region
    )


def test_no_rows_give_no_values() -> None:
    for region in ({"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.3}):
        assert trust_region_entropy(torch.zeros(0, 3, 100), **region).shape == (0, 3)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({}, "exactly one of top_k, top_p and min_p"),
        ({"top_k": 2, "top_p": 0.9}, "exactly one .*, not top_k=2, top_p=0.9, min_p=None"),
        ({"top_k": 2, "min_p": 0.1}, "exactly one .*, not top_k=2, top_p=None, min_p=0.1"),
        ({"top_p": 0.9, "min_p": 0.1}, "exactly one .*, not top_k=None, top_p=0.9, min_p=0.1"),
        ({"top_k": 2, "top_p": 0.9, "min_p": 0.1}, "exactly one of top_k, top_p and min_p"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": -3}, "top_k=-3 must be at least 1"),
        *(
            ({name: value}, rf"{name}={value} must lie between 0 and 1")
            for name in ("top_p", "min_p")
            for value in (0.0, 1.0, -0.5, math.nan)
        ),
    ],
)
def test_a_bad_region_is_refused(region: dict[str, Any], message: str) -> None:
    for function in (trust_region_entropy, trust_region_mask, entropy_stats):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(3), **region)
    with pytest.raises(ValueError, match=message):
        check_region(**region)


# --- gradient ---


@pytest.mark.parametrize(
    "region", [{"top_k": 4}, {"top_p": 0.8}, {"top_p": 0.995}, {"min_p": 0.05}]
)
@pytest.mark.parametrize("rescale", [True, False])
def test_gradient_is_that_of_the_region_alone(region: dict[str, float], rescale: bool) -> None:
    torch.manual_seed(0)
    logits = (2 * torch.randn(4, 200, dtype=torch.float64)).requires_grad_()
    with torch.no_grad():
        logits[0, 7:] = -INF
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (trust_region_entropy(logits, **region, rescale=rescale) * weights).sum().backward()
    for row, weight, gradient in zip(
        logits.detach().tolist(), weights.tolist(), logits.grad.tolist(), strict=True
    ):
        inside = brute_region(row, **region)
        q = dict(zip(inside, softmax([row[i] for i in inside]), strict=True))
        entropy = brute_entropy(row, inside)
        scale = brute_scale(row, inside) if rescale else 1.0
        expected = [
            -weight * scale * q[i] * (math.log(q[i]) + entropy) if i in q else 0.0
            for i in range(len(row))
        ]
        assert gradient == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("region", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.35}])
def test_gradcheck(region: dict[str, float]) -> None:
    torch.manual_seed(0)
    # Well separated, so that the small steps do not change the region.
    logits = torch.stack([torch.randperm(9) * 0.3 for _ in range(3)]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: trust_region_entropy(z, **region), logits)
    assert torch.autograd.gradcheck(full_entropy, logits)


def test_impossible_tokens_get_no_gradient_from_the_full_entropy() -> None:
    logits = torch.tensor([1.0, -INF, 0.0], dtype=torch.float64, requires_grad=True)
    full_entropy(logits).backward()
    q = softmax([1.0, 0.0])
    entropy = -sum(x * math.log(x) for x in q)
    expected = [-q[0] * (math.log(q[0]) + entropy), 0.0, -q[1] * (math.log(q[1]) + entropy)]
    assert logits.grad.tolist() == pytest.approx(expected)


def test_stats_carry_no_gradient() -> None:
    stats = entropy_stats(torch.zeros(2, 3, requires_grad=True), top_k=2)
    assert not any(part.requires_grad for part in stats)
