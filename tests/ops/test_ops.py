"""Tests of tre_lightning.ops, against tre_lightning.entropy, the readable reference."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tre_lightning.entropy import (
    EntropyStats,
    entropy_stats,
    full_entropy,
    trust_region_entropy,
    trust_region_mask,
)
from tre_lightning.ops import (
    LogprobsAndEntropy,
    PolicyOutputs,
    Region,
    fused_linear_logprobs_and_entropy,
    logprobs_and_entropy,
)
from tre_lightning.ops.functions import (
    LossSum,
    fused_linear_loss,
    fused_linear_token_stats,
    token_stats,
)
from tre_lightning.ops.region import RegionRows
from tre_lightning.ops.scan import scan

INF = math.inf
WHOLE, TOP_K, TOP_P = Region(), Region(top_k=3), Region(top_p=0.8)
MIN_P = Region(min_p=0.25)
REGIONS = pytest.mark.parametrize("region", [WHOLE, TOP_K, TOP_P, MIN_P], ids=str)
TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 0.7])
ROUNDING = {"rtol": 0.0, "atol": 1e-9}  # of float64

Grads = tuple[Tensor, ...]


# --- the reference ---


def reference(
    logits: Tensor, labels: Tensor, regions: Sequence[Region], temperature: float = 1.0
) -> PolicyOutputs:
    """What the ops should return, from tre_lightning.entropy; differentiated by autograd."""
    z = logits / temperature
    logprobs = z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def stats(region: Region) -> EntropyStats:
        if region.whole:
            full = full_entropy(z)
            zeros, size = torch.zeros_like(full), torch.full_like(labels, z.shape[-1])
            return EntropyStats(full, full, full, zeros + 1, size, zeros)
        kind = asdict(region)
        return entropy_stats(z, **kind)._replace(
            region=trust_region_entropy(z, **kind, rescale=False),
            scaled=trust_region_entropy(z, **kind),
        )

    return PolicyOutputs(logprobs, {region: stats(region) for region in regions})


def named(stats: PolicyOutputs, region: Region) -> LogprobsAndEntropy:
    found = stats.entropies[region]
    return LogprobsAndEntropy(stats.logprobs, found.scaled, found.full, found.size, found.tail_mass)


def weighted(stats: PolicyOutputs) -> Tensor:
    """A number to which every log-probability and entropy contributes with its own weight."""
    place = torch.arange(stats.logprobs.numel(), dtype=torch.float64).view(stats.logprobs.shape)
    total = ((place + 1).cos() * stats.logprobs).sum()
    for i, found in enumerate(stats.entropies.values()):
        total = (
            total
            + ((place + i + 0.5).sin() * found.scaled + (place + i).cos() * found.region).sum()
        )
    return total


def assert_same(mine: Any, theirs: Any, **tolerance: float) -> None:
    torch.testing.assert_close(mine, theirs, **(tolerance or ROUNDING), equal_nan=True)


def assert_like_reference(
    logits: Tensor, labels: Tensor, regions: Sequence[Region], temperature: float = 1.0
) -> None:
    """Values and gradients of float64 logits."""
    leaf = logits.clone().requires_grad_()
    mine = token_stats(leaf, labels, regions, temperature)
    theirs = reference(leaf, labels, regions, temperature)
    assert_same(mine.logprobs, theirs.logprobs)
    for region in regions:
        assert torch.equal(mine.entropies[region].size, theirs.entropies[region].size)
        assert_same(tuple(mine.entropies[region]), tuple(theirs.entropies[region]))
    assert_same(grad(weighted(mine), leaf), grad(weighted(theirs), leaf))


def grad(total: Tensor, *leaves: Tensor, **options: bool) -> Grads:
    return torch.autograd.grad(total, leaves, **options)


def region_rows(logits: Tensor, region: Region, temperature: float = 1.0) -> RegionRows:
    """The regions as the ops hold them."""
    labels = torch.zeros(len(logits), dtype=torch.long)
    return scan(logits, labels, [region], temperature).regions[0]


def assert_mask(logits: Tensor, region: Region, temperature: float = 1.0) -> RegionRows:
    """Both descriptions of the region, its edge and its list, name the reference's tokens.

    The gradient does not tell where all tokens of a region are equal.
    """
    z = logits / temperature
    expected = trust_region_mask(z, **asdict(region))
    rows = region_rows(logits, region, temperature)
    threshold, last = rows.threshold.unsqueeze(1), rows.last.unsqueeze(1)
    by_edge = (z > threshold) | ((z == threshold) & (torch.arange(z.shape[1]) <= last))
    assert torch.equal(by_edge, expected)
    listed = torch.zeros_like(expected)
    for row in (~rows.wide).nonzero().flatten().tolist():
        listed[row, rows.ids[row][rows.listed()[row]]] = True
    assert torch.equal(listed, expected & ~rows.wide.unsqueeze(1))
    return rows


def support(logits: Tensor, region: Region) -> list[list[int]]:
    """The tokens of each row that the region's entropy depends on."""
    leaf = logits.clone().requires_grad_()
    labels = torch.zeros(len(logits), dtype=torch.long)
    entropy = logprobs_and_entropy(leaf, labels, **asdict(region)).entropy
    return [row.nonzero().flatten().tolist() for row in grad(entropy.sum(), leaf)[0]]


def operands(
    count: int, width: int, vocabulary: int, spread: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias, that want gradients, and labels."""
    generator = torch.Generator().manual_seed(0)

    def leaf(scale: float, *shape: int) -> Tensor:
        values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    hidden, weight = leaf(1.0, count, width), leaf(spread / math.sqrt(width), vocabulary, width)
    labels = torch.randint(vocabulary, (count,), generator=generator)
    return hidden, weight, leaf(0.5, vocabulary), labels


def curved_loss(rows: slice, stats: PolicyOutputs) -> Tensor:
    """A loss in which places, log-probabilities and entropies all count, in no linear way."""
    place = torch.arange(rows.start, rows.stop, dtype=stats.logprobs.dtype)
    loss = (place + 1).cos() * stats.logprobs.exp()
    for i, found in enumerate(stats.entropies.values()):
        loss = loss + (place + i).sin() * found.scaled + 0.1 * found.region**2
    return loss


def unfused_loss(
    leaves: Sequence[Tensor], labels: Tensor, regions: Sequence[Region], temperature: float
) -> LossSum:
    """What fused_linear_loss should return of ``curved_loss``."""
    stats = reference(F.linear(*leaves), labels, regions, temperature)
    losses = curved_loss(slice(0, len(labels)), stats)
    return LossSum(losses.sum(), losses, stats.logprobs)


# --- by hand ---

P = [0.1, 0.5, 0.1, 0.3]


def entropy_of(weights: Sequence[float]) -> float:
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)


@pytest.mark.parametrize(
    ("region", "kept", "tail_mass"),
    [
        ({"top_k": 1}, [0.5], 0.5),
        ({"top_k": 2}, [0.5, 0.3], 0.2),
        ({"top_k": 3}, [0.5, 0.3, 0.1], 0.1),
        ({"top_k": 9}, P, 0.0),
        ({"top_p": 0.45}, [0.5], 0.5),
        ({"top_p": 0.55}, [0.5, 0.3], 0.2),
        ({"top_p": 0.85}, [0.5, 0.3, 0.1], 0.1),
        ({"top_p": 0.95}, P, 0.0),
        ({"min_p": 0.61}, [0.5], 0.5),
        ({"min_p": 0.59}, [0.5, 0.3], 0.2),
        ({"min_p": 0.19}, P, 0.0),  # both of 0.1
        ({}, P, 0.0),
    ],
)
@TEMPERATURES
def test_by_hand(
    region: dict[str, Any], kept: list[float], tail_mass: float, temperature: float
) -> None:
    # softmax(logits / temperature) is P.
    logits = temperature * torch.tensor([[P, P]], dtype=torch.float64).log() + 0.75
    labels = torch.tensor([[3, 0]])
    eye = torch.eye(4, dtype=torch.float64)
    scale = math.log(4) / math.log(len(kept)) if len(kept) > 1 else 0.0
    for out in (
        logprobs_and_entropy(logits, labels, **region, temperature=temperature),
        fused_linear_logprobs_and_entropy(logits, eye, labels, **region, temperature=temperature),
    ):
        assert all(part.shape == (1, 2) for part in out)
        assert out.logprobs[0].tolist() == pytest.approx([math.log(0.3), math.log(0.1)])
        assert out.entropy[0].tolist() == pytest.approx([scale * entropy_of(kept)] * 2)
        assert out.full_entropy[0].tolist() == pytest.approx([entropy_of(P)] * 2)
        assert out.region_size[0].tolist() == [len(kept)] * 2
        assert out.region_size.dtype == torch.int64
        assert out.tail_mass[0].tolist() == pytest.approx([tail_mass] * 2, abs=1e-12)


@TEMPERATURES
def test_gradient_by_hand(temperature: float) -> None:
    logits = (temperature * torch.tensor([P], dtype=torch.float64).log()).requires_grad_()
    out = logprobs_and_entropy(logits, torch.tensor([2]), top_k=2, temperature=temperature)
    q, entropy = {1: 0.625, 3: 0.375}, entropy_of([0.5, 0.3])
    scale = 2.0  # log 4 / log 2
    d_entropy = {i: -scale * x * (math.log(x) + entropy) for i, x in q.items()}
    expected = [
        (5.0 * ((i == 2) - P[i]) + 7.0 * d_entropy.get(i, 0.0)) / temperature for i in range(4)
    ]
    (gradient,) = grad((5.0 * out.logprobs + 7.0 * out.entropy).sum(), logits)
    assert gradient[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("region", [Region(top_k=1), Region(top_p=0.4), Region(min_p=0.9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_region_of_one_token_has_entropy_and_gradient_0(
    region: Region, dtype: torch.dtype
) -> None:
    logits = torch.tensor([P, P[::-1]], dtype=dtype).log().requires_grad_()
    out = logprobs_and_entropy(logits, torch.tensor([0, 0]), **asdict(region))
    assert out.region_size.tolist() == [1, 1]
    assert out.entropy.tolist() == [0.0, 0.0]
    assert grad(out.entropy.sum(), logits)[0].count_nonzero() == 0
    stats = token_stats(logits, torch.tensor([0, 0]), [region])
    assert stats.entropies[region].scale.tolist() == [0.0, 0.0]


def test_only_logprobs_and_entropy_carry_a_gradient() -> None:
    logits = torch.tensor([P]).log().requires_grad_()
    out = logprobs_and_entropy(logits, torch.tensor([0]), top_k=2)
    assert [name for name, part in out._asdict().items() if part.requires_grad] == [
        "logprobs",
        "entropy",
    ]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3)])
def test_any_number_of_axes_and_any_strides(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, *shape, dtype=torch.float64).movedim(0, -1)
    labels = torch.randint(9, shape)
    assert_like_reference(logits, labels, [WHOLE, TOP_K, TOP_P, MIN_P])
    hidden = torch.randn(5, *shape, dtype=torch.float64).movedim(0, -1)
    weight = torch.randn(5, 9, dtype=torch.float64).T
    fused = fused_linear_token_stats(hidden, weight, labels, [TOP_P], memory=1)
    expected = reference(F.linear(hidden, weight), labels, [TOP_P])
    assert_same(named(fused, TOP_P), named(expected, TOP_P))


def test_many_tokens_and_any_strides() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2560, 3, dtype=torch.float64).T
    assert_like_reference(logits, torch.tensor([5, 0, 2559]), [WHOLE, TOP_K, TOP_P, MIN_P])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_token_ids_may_be_of_either_integer_type(dtype: torch.dtype) -> None:
    leaf = torch.tensor([P]).log().requires_grad_()
    out = logprobs_and_entropy(leaf, torch.tensor([1], dtype=dtype), top_k=2)
    assert out.logprobs.item() == pytest.approx(math.log(0.5))
    (gradient,) = grad(out.logprobs.sum(), leaf)
    assert gradient[0].tolist() == pytest.approx([-0.1, 0.5, -0.1, -0.3])


# --- gradients ---


@REGIONS
@TEMPERATURES
def test_gradcheck_from_logits(region: Region, temperature: float) -> None:
    torch.manual_seed(0)
    # Well separated, so that the small steps do not change the region.
    logits = torch.stack([torch.randperm(9) * 0.3 for _ in range(3)]).double().requires_grad_()
    labels = torch.tensor([0, 8, 4])

    def values(z: Tensor) -> Grads:
        return logprobs_and_entropy(z, labels, **asdict(region), temperature=temperature)[:2]

    assert torch.autograd.gradcheck(values, logits)


@REGIONS
@TEMPERATURES
def test_gradcheck_from_hidden_states(region: Region, temperature: float) -> None:
    *leaves, labels = operands(5, 4, 7)
    options = {**asdict(region), "temperature": temperature, "memory": 2 * 7 * 8}

    def values(hidden: Tensor, weight: Tensor, bias: Tensor) -> Grads:
        return fused_linear_logprobs_and_entropy(hidden, weight, labels, bias=bias, **options)[:2]

    assert torch.autograd.gradcheck(values, leaves)


@REGIONS
@TEMPERATURES
def test_gradient_of_the_loss_inside_equals_its_differences(
    region: Region, temperature: float
) -> None:
    *leaves, labels = operands(5, 4, 7)
    hidden, weight, bias = leaves
    options = {"bias": bias, "temperature": temperature, "memory": 2 * 7 * 8}

    def total() -> Tensor:
        return (
            3.0 * fused_linear_loss(hidden, weight, labels, curved_loss, [region], **options).total
        )

    for leaf, gradient in zip(leaves, grad(total(), *leaves), strict=True):
        numbers = leaf.detach().view(-1)  # gradcheck itself would go backward twice
        for i, number in enumerate(numbers.tolist()):
            ends = []
            for step in (1e-6, -1e-6):
                numbers[i] = number + step
                ends.append(total().item())
            numbers[i] = number
            difference = (ends[0] - ends[1]) / 2e-6
            assert gradient.view(-1)[i].item() == pytest.approx(difference, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("region", [WHOLE, Region(top_k=300), TOP_P, Region(min_p=0.03)], ids=str)
@TEMPERATURES
def test_gradients_of_wide_regions(region: Region, temperature: float) -> None:
    *leaves, labels = operands(6, 5, 700, spread=0.5)
    hidden, weight, bias = leaves
    logits = F.linear(*leaves)
    rows = region_rows(logits.detach(), region, temperature)
    assert rows.wide.all() and int(rows.size.min()) > 128
    theirs = reference(logits, labels, [region], temperature)
    options = {"bias": bias, "temperature": temperature, "memory": 4 * 700 * 8}
    mine = fused_linear_token_stats(hidden, weight, labels, [region], **options)
    assert_same(named(mine, region), named(theirs, region))
    expected = grad(weighted(theirs), *leaves)
    assert_same(grad(weighted(mine), *leaves), expected)

    inside = fused_linear_loss(hidden, weight, labels, curved_loss, [region], **options)
    outside = unfused_loss(leaves, labels, [region], temperature)
    assert_same(tuple(inside), tuple(outside))
    assert_same(grad(inside.total, *leaves), grad(outside.total, *leaves))


def test_gradients_of_some_operands_only() -> None:
    hidden, weight, bias, labels = operands(5, 4, 7)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    wanted = {
        name: grad(
            weighted(reference(F.linear(hidden, weight, bias), labels, [TOP_K])), leaves[name]
        )
        for name in leaves
    }
    for name, leaf in leaves.items():
        others = {n: part.detach() for n, part in leaves.items()} | {name: leaf}
        fused = fused_linear_token_stats(labels=labels, regions=[TOP_K], **others)
        assert_same(grad(weighted(fused), leaf), wanted[name])
        loss = fused_linear_loss(
            labels=labels, loss=curved_loss, regions=[TOP_K], **others, memory=1
        )
        outside = unfused_loss((hidden, weight, bias), labels, [TOP_K], 1.0)
        assert_same(grad(loss.total, leaf), grad(outside.total, leaf))


def test_a_second_derivative_is_an_error_and_not_a_wrong_number() -> None:
    leaf = torch.tensor([P]).log().requires_grad_()
    out = logprobs_and_entropy(leaf, torch.tensor([0]), top_k=2)
    (first,) = grad(out.entropy.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


# --- against the reference, whatever the rows ---

ROWS: dict[str, Callable[[Tensor], Tensor]] = {  # of normal noise
    "normal": lambda noise: 2 * noise + 5,
    "peaked": lambda noise: 8 * noise,
    "far apart": lambda noise: 100 * noise,
    "flat": lambda noise: 0.01 * noise,
    "integers": lambda noise: (2 * noise).round(),  # many ties
    "two levels": lambda noise: (noise > 1.5).double(),
    "equal": lambda noise: torch.full_like(noise, -3.5),
    "half masked": lambda noise: noise.masked_fill((noise < 0) & (noise < noise.max()), -INF),
    "one possible": lambda noise: noise.masked_fill(noise < noise.max(), -INF),
}


@dataclass(frozen=True)
class Case:
    """Rows of different kinds, and what is asked of them."""

    logits: Tensor  # [N, V] float64
    labels: Tensor  # [N]
    region: Region
    temperature: float

    def assume_a_clear_edge(self, margin: float) -> None:
        """Leave out rows where rounding decides: mass at top_p, or all but equal at the edge."""
        z = (self.logits / self.temperature).sort(descending=True).values
        if self.region.top_p is not None:
            masses = z.softmax(-1).cumsum(-1)
            assume(float((masses - self.region.top_p).abs().min()) > margin)
        if self.region.min_p is not None:
            gaps = z - z[:, :1] - math.log(self.region.min_p)
            assume(float(gaps.abs().min()) > margin)
        theirs = reference(self.logits, self.labels, [self.region], self.temperature)
        size = theirs.entropies[self.region].size.unsqueeze(1)
        gap = z.gather(1, size - 1) - z.gather(1, size.clamp(max=z.shape[1] - 1))
        assume(bool(((gap == 0) | (gap > margin)).all()))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    # Candidates are a part of the row from 3073 tokens on for a nucleus of 16, from 17409 on for
    # one of 128, and for the top k from 64 * 2 * (k + 8) on.
    vocabulary = draw(
        st.one_of(
            st.integers(1, 8),
            st.integers(1, 600),
            st.integers(500, 3000),
            st.sampled_from([64, 512, 513, 3073, 4096, 18_000, 18_432]),
        )
    )
    region = draw(
        st.one_of(
            st.just(Region()),
            st.integers(1, 20).map(lambda k: Region(top_k=k)),
            st.integers(1, 600).map(lambda k: Region(top_k=k)),
            st.floats(0.01, 0.999).map(lambda p: Region(top_p=p)),
            st.floats(1e-4, 0.999).map(lambda p: Region(min_p=p)),
        )
    )
    kinds = draw(st.lists(st.sampled_from(list(ROWS)), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    noise = torch.randn(len(kinds), vocabulary, generator=generator, dtype=torch.float64)
    logits = torch.stack([ROWS[kind](row) for kind, row in zip(kinds, noise, strict=True)])
    labels = torch.randint(vocabulary, (len(kinds),), generator=generator)
    return Case(logits, labels, region, draw(st.sampled_from([1.0, 0.3, 0.7, 2.5])))


@given(cases())
@settings(max_examples=300)
def test_equal_to_the_reference_in_float64(case: Case) -> None:
    case.assume_a_clear_edge(1e-9)
    assert_like_reference(case.logits, case.labels, [case.region], case.temperature)
    if not case.region.whole:
        assert_mask(case.logits, case.region, case.temperature)


@given(cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=200)
def test_lower_precision_costs_no_more_than_float32s_rounding(
    case: Case, dtype: torch.dtype
) -> None:
    logits = case.logits.to(dtype)
    of_rounded = Case(logits.double(), case.labels, case.region, case.temperature)
    z = of_rounded.logits / case.temperature
    # Rounding of a logit, of log_norm and of a sum over the row; found: up to twice this.
    unit = torch.finfo(torch.float32).eps * (
        1 + float(z[z > -INF].abs().max()) + math.log(z.shape[1])
    )
    of_rounded.assume_a_clear_edge(4 * unit)
    leaf, exact = logits.clone().requires_grad_(), of_rounded.logits.clone().requires_grad_()
    mine = logprobs_and_entropy(
        leaf, case.labels, **asdict(case.region), temperature=case.temperature
    )
    stats = reference(exact, case.labels, [case.region], case.temperature)
    theirs = named(stats, case.region)
    scale = 1 + float(stats.entropies[case.region].scale.max())  # the entropy's error grows with it

    assert torch.equal(mine.region_size, theirs.region_size)
    for name, factor in (
        ("logprobs", 1),
        ("entropy", scale),
        ("full_entropy", 1),
        ("tail_mass", 1),
    ):
        value = getattr(mine, name)
        assert value.dtype == torch.float32
        assert_same(value.double(), getattr(theirs, name), rtol=0.0, atol=3 * unit * factor)
    (d_mine,), (d_theirs,) = (
        grad((out.logprobs + out.entropy).sum(), x) for out, x in ((mine, leaf), (theirs, exact))
    )
    assert d_mine.dtype == dtype
    # The gradient is computed in float32 and rounded once, by half an eps of the logits' dtype.
    once = 0.0 if dtype == torch.float32 else 0.501 * torch.finfo(dtype).eps
    slack = unit * scale / case.temperature
    assert_same(d_mine.double(), d_theirs, rtol=once, atol=slack)


@pytest.mark.parametrize("region", [WHOLE, TOP_K, Region(top_k=300), TOP_P, MIN_P], ids=str)
@pytest.mark.parametrize("shape", [(3000, 400), (110, 20_000)])
def test_more_logits_than_are_worked_on_at_once(region: Region, shape: tuple[int, int]) -> None:
    assert shape[0] * shape[1] > 2**20
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    logits[::3] *= 6  # narrow and wide nuclei
    labels = torch.randint(shape[1], shape[:1], generator=generator)
    assert_like_reference(logits, labels, [region], 0.7)


@pytest.mark.parametrize("vocabulary", [512, 513, 3500, 18_000])
def test_sizes_around_those_that_are_looked_for(vocabulary: int) -> None:
    # 16 and 128 tokens of a nucleus, then all; 256 of the top k.
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(1, vocabulary, dtype=torch.float64)
    order = torch.randperm(vocabulary, generator=generator)
    logits[0, order] = -1e-3 * torch.arange(vocabulary, dtype=torch.float64)
    p = logits.softmax(-1)[0, order]
    for size in (15, 16, 17, 18, 127, 128, 129, 130, 255, 256, 257):
        top_p = float(p[:size].sum() - p[size - 1] / 2)
        min_p = math.exp(-1e-3 * (size - 0.5))
        for region in (Region(top_p=top_p), Region(top_k=size), Region(min_p=min_p)):
            assert assert_mask(logits, region).size.item() == size
            assert_like_reference(logits, torch.tensor([0]), [region])


# --- ties ---


def row_with(
    vocabulary: int,
    values: dict[int, float],
    rest: float = -5.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """One row: some tokens' logits, and a little noise around ``rest`` elsewhere."""
    row = rest + 0.1 * torch.rand(
        1, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    row[0, list(values)] = torch.tensor(list(values.values()), dtype=torch.float64)
    return row.to(dtype)


def test_a_tie_at_the_edge_goes_to_the_lower_ids_across_blocks() -> None:
    # 40 blocks of 64: the 3 + 8 with the largest maxima are looked at.
    logits = row_with(2560, {2000: 3.0, 2300: 2.0, 700: 2.0, 100: 2.0, 1500: 2.0})
    assert support(logits, Region(top_k=3)) == [[100, 700, 2000]]
    rows = region_rows(logits, Region(top_k=3))
    assert not rows.wide.any() and rows.last.tolist() == [700]
    # Masses .5761, .8238 of the four, each .1 and a half: the second of them crosses .7.
    p = logits.softmax(-1)[0]
    top_p = float(p[2000] + 1.5 * p[100])
    assert support(logits, Region(top_p=top_p)) == [[100, 700, 2000]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ties_wherever_they_stand(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        top, *tied = torch.randperm(2560, generator=generator)[:7].tolist()
        logits = row_with(2560, {top: 3.0} | dict.fromkeys(tied, 2.0), dtype=dtype)
        for top_k in (2, 3, 5):
            expected = sorted([top, *sorted(tied)[: top_k - 1]])
            assert support(logits, Region(top_k=top_k)) == [expected]


def test_more_tied_blocks_than_are_looked_at() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randperm(40, generator=generator)[:30] * 64
    tied = (blocks + torch.randint(64, (30,), generator=generator)).tolist()
    assert 2001 not in tied
    logits = row_with(2560, dict.fromkeys(tied, 2.0) | {2001: 3.0})
    assert support(logits, Region(top_k=3)) == [sorted([2001, *sorted(tied)[:2]])]
    assert region_rows(logits, Region(top_k=3)).wide.all()
    # As many as are looked at, too, may have another elsewhere.
    eleven = dict.fromkeys(tied[:10], 2.0) | {2001: 3.0}
    assert support(row_with(2560, eleven), Region(top_k=3)) == [
        sorted([2001, *sorted(tied[:10])[:2]])
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("region", [Region(top_k=3), Region(top_k=300), Region(top_p=0.45)])
def test_zero_and_minus_zero_tie(dtype: torch.dtype, region: Region) -> None:
    logits = torch.zeros(1, 2560, dtype=dtype)
    logits[0, ::2] = -0.0
    logits[0, 2001] = 1.0
    rows = region_rows(logits, region)
    size = rows.size.item()
    # 2001 and the lowest ids: those before it, and one fewer where it is among them itself.
    lowest = [i for i in range(2560) if i != 2001][: size - 1]
    assert support(logits, region) == [sorted([*lowest, 2001])]
    if region.top_k is not None:
        assert size == region.top_k
    else:
        assert size == math.ceil((0.45 * (2559 + math.e) - math.e) + 1)


@pytest.mark.parametrize("vocabulary", [40, 700, 3500])
def test_regions_of_tied_tokens_alone(vocabulary: int) -> None:
    logits = torch.zeros(2, vocabulary, dtype=torch.float64)
    logits[1, vocabulary // 2 :] = 1.0
    for region in (
        Region(top_k=1),
        Region(top_k=17),
        Region(top_k=290),
        Region(top_p=0.317),
        Region(min_p=0.9),
    ):
        assert_mask(logits, region)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 30, 400])
@pytest.mark.parametrize("vocabulary", [450, 3500])
def test_all_tokens_that_tie_at_the_edge_of_min_p_are_in(
    vocabulary: int, count: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    tied = torch.randperm(vocabulary, generator=generator)[:count]
    logits = row_with(vocabulary, dict.fromkeys(tied.tolist(), 2.0), dtype=dtype)
    logits[0, tied[0]] = 2.5
    for region in (Region(min_p=math.exp(-0.5)), Region(min_p=0.01)):
        rows = region_rows(logits, region)
        assert rows.size.item() == count
        assert rows.last.item() == vocabulary - 1
        assert support(logits, region) == [sorted(tied.tolist())]
    assert region_rows(logits, Region(min_p=math.exp(-0.49))).size.item() == 1


# --- top_p out of reach ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [5, 300, 700, 3500, 18_000])
def test_top_p_out_of_reach_by_rounding(vocabulary: int, dtype: torch.dtype) -> None:
    noise = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = torch.stack([make(noise) for make in ROWS.values()]).to(dtype).requires_grad_()
    labels = torch.zeros(len(logits), dtype=torch.long)
    out = logprobs_and_entropy(logits, labels, top_p=1 - 1e-12)
    possible = (logits > -INF).sum(-1)
    assert (out.region_size >= 1).all() and (out.region_size <= possible).all()
    flat = list(ROWS).index("flat")
    assert out.region_size[flat] >= 0.9999 * vocabulary  # each token counts
    assert out.entropy.isfinite().all() and out.tail_mass.isfinite().all()
    assert out.tail_mass.max() < 1e-5
    assert grad(out.entropy.sum(), logits)[0].isfinite().all()


# --- what has no probability ---


@pytest.mark.parametrize("bad", ["nan", "all -inf"])
@pytest.mark.parametrize("vocabulary", [9, 700, 4100])
def test_an_undefined_row_is_nan_and_leaves_the_others_alone(bad: str, vocabulary: int) -> None:
    torch.manual_seed(0)
    regions = [WHOLE, Region(top_k=2), Region(top_k=300), TOP_P, MIN_P, Region(min_p=1e-9)]
    good = torch.randn(4, vocabulary)
    good[3] *= 8
    rows = good.clone()
    if bad == "nan":
        rows[1, vocabulary // 2] = math.nan
    else:
        rows[1] = -INF
    labels = torch.tensor([1, 2, 3, 4])
    outs = []
    for logits in (good.requires_grad_(), rows.requires_grad_()):
        stats = token_stats(logits, labels, regions, 0.7)
        outs.append((stats, grad(weighted(stats), logits)[0]))
    (clean, d_clean), (dirty, d_dirty) = outs
    others = [0, 2, 3]
    assert dirty.logprobs[1].isnan() and d_dirty[1].isnan().all()
    assert torch.equal(dirty.logprobs[others], clean.logprobs[others])
    assert torch.equal(d_dirty[others], d_clean[others])
    for region in regions:
        found = dirty.entropies[region]
        assert found.full[1].isnan() and found.region[1].isnan() and found.scaled[1].isnan()
        if not region.whole:
            assert found.size[1] == 0 and found.tail_mass[1].isnan()
        for mine, theirs in zip(found, clean.entropies[region], strict=True):
            assert torch.equal(mine[others], theirs[others])


@pytest.mark.parametrize("region", [WHOLE, TOP_K, Region(top_k=300), TOP_P, MIN_P], ids=str)
def test_a_label_at_minus_infinity(region: Region) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 700, dtype=torch.float64)
    logits[0, 5] = -INF
    out = logprobs_and_entropy(logits, torch.tensor([5, 6]), **asdict(region))
    assert out.logprobs[0] == -INF and out.logprobs[1].isfinite()
    leaf = logits.requires_grad_()
    stats = token_stats(leaf, torch.tensor([5, 6]), [region])
    assert grad(weighted(stats), leaf)[0].isfinite().all()
    assert_like_reference(logits.detach(), torch.tensor([5, 6]), [region])


# --- several regions at once ---


@TEMPERATURES
def test_several_regions_equal_one_at_a_time(temperature: float) -> None:
    regions = [Region(), Region(top_k=2), Region(top_k=300), Region(top_p=0.9), Region(top_p=0.1)]
    regions += [Region(min_p=0.5), Region(min_p=1e-4)]
    *leaves, labels = operands(7, 5, 700)
    hidden, weight, bias = leaves
    options = {"bias": bias, "temperature": temperature, "memory": 3 * 700 * 8}
    logits = F.linear(*leaves)

    def entropies(stats: PolicyOutputs) -> Tensor:
        place = torch.arange(1.0, 8.0, dtype=torch.float64)
        return sum(
            ((place * f.scaled).sum() for f in stats.entropies.values()), place.new_zeros(())
        )

    for compute in (
        lambda some: token_stats(logits, labels, some, temperature),
        lambda some: fused_linear_token_stats(hidden, weight, labels, some, **options),
    ):
        together = compute(regions)
        assert list(together.entropies) == regions
        alone = [compute([region]) for region in regions]
        for region, stats in zip(regions, alone, strict=True):
            assert torch.equal(stats.logprobs, together.logprobs)
            for mine, theirs in zip(
                together.entropies[region], stats.entropies[region], strict=True
            ):
                assert torch.equal(mine, theirs)
        parts = [grad(entropies(stats), *leaves, retain_graph=True) for stats in alone]
        sums = tuple(sum(column) for column in zip(*parts, strict=True))
        assert_same(grad(entropies(together), *leaves, retain_graph=True), sums)
    assert token_stats(logits, labels, []).entropies == {}


def test_no_gradient_of_a_region_that_the_loss_leaves_out() -> None:
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    stats = token_stats(logits, torch.tensor([0, 1, 2]), [TOP_K, WHOLE])
    alone = token_stats(logits, torch.tensor([0, 1, 2]), [WHOLE])
    assert_same(
        grad(stats.entropies[WHOLE].region.sum(), logits),
        grad(alone.entropies[WHOLE].region.sum(), logits),
    )


# --- chunks ---


@pytest.mark.parametrize("with_bias", [True, False])
def test_results_do_not_depend_on_memory(with_bias: bool) -> None:
    hidden, weight, bias, labels = operands(150, 4, 60)
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    regions, row = [WHOLE, TOP_K, TOP_P], 60 * 8
    tight = {"rtol": 1e-12, "atol": 1e-12}
    options: dict[str, Any] = {"bias": bias if with_bias else None, "temperature": 0.7}
    expected = reference(F.linear(*leaves), labels, regions, 0.7)
    d_expected = grad(weighted(expected), *leaves)
    outside = unfused_loss(leaves, labels, regions, 0.7)
    d_outside = grad(outside.total, *leaves)
    for memory in (1, row, 7 * row, 64 * row, 149 * row, 150 * row, 2**40):
        options["memory"] = memory
        stats = fused_linear_token_stats(hidden, weight, labels, regions, **options)
        for region in regions:
            assert_same(named(stats, region), named(expected, region), **tight)
        assert_same(grad(weighted(stats), *leaves), d_expected, **tight)
        loss = fused_linear_loss(hidden, weight, labels, curved_loss, regions, **options)
        assert_same(tuple(loss), tuple(outside), **tight)
        assert_same(grad(loss.total, *leaves), d_outside, **tight)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("budget", [1, 3, 64, 100, 129, 1000])
def test_the_loss_sees_each_row_once_in_order_and_no_more_than_the_budget(
    count: int, budget: int
) -> None:
    hidden, weight, _, labels = operands(count, 3, 20)
    expected = reference(F.linear(hidden, weight), labels, [TOP_K])
    seen: list[int] = []

    def loss(rows: slice, stats: PolicyOutputs) -> Tensor:
        here = list(range(count))[rows]
        assert 1 <= len(here) <= budget
        seen.extend(here)
        assert_same(stats.logprobs, expected.logprobs[rows])
        for mine, theirs in zip(stats.entropies[TOP_K], expected.entropies[TOP_K], strict=True):
            assert_same(mine, theirs[rows])
        return stats.logprobs

    fused_linear_loss(hidden, weight, labels, loss, [TOP_K], memory=budget * 20 * 8 + 7)
    assert seen == list(range(count))


def test_a_loss_of_several_parts() -> None:
    hidden, weight, _, labels = operands(9, 3, 20)

    def loss(rows: slice, stats: PolicyOutputs) -> Tensor:
        return torch.stack([stats.logprobs, 2 * stats.entropies[TOP_K].scaled])

    total, losses, logprobs = fused_linear_loss(
        hidden, weight, labels, loss, [TOP_K], memory=4 * 20 * 8
    )
    expected = reference(F.linear(hidden, weight), labels, [TOP_K])
    assert_same(losses, loss(slice(0, 9), expected).detach())
    assert_same(total, losses.sum())
    assert_same(logprobs, expected.logprobs.detach())
    assert total.requires_grad and not losses.requires_grad and not logprobs.requires_grad
    theirs = loss(slice(0, 9), expected).sum()
    assert_same(grad(total, hidden, weight), grad(theirs, hidden, weight))


def test_the_loss_inside_without_any_gradient() -> None:
    hidden, weight, _, labels = operands(9, 3, 20)
    expected = unfused_loss((hidden, weight), labels, [TOP_K], 1.0).total.item()

    def loss(rows: slice, stats: PolicyOutputs) -> Tensor:
        return curved_loss(rows, stats).detach()  # to take its gradient would be an error

    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            out = fused_linear_loss(hidden, weight, labels, loss, [TOP_K], memory=700)
        assert not out.total.requires_grad
        assert out.total.item() == pytest.approx(expected)


def test_the_loss_inside_gives_its_gradient_once() -> None:
    hidden, weight, _, labels = operands(3, 4, 7)
    total = fused_linear_loss(hidden, weight, labels, curved_loss, [TOP_K]).total
    grad(total, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its gradient once"):
        grad(total, hidden)


@REGIONS
def test_no_rows(region: Region) -> None:
    hidden, weight, bias, labels = operands(0, 4, 7)
    leaves = (hidden, weight, bias)
    for logits in (torch.zeros(0, 7, requires_grad=True), torch.zeros(2, 0, 7, requires_grad=True)):
        none = torch.zeros(logits.shape[:-1], dtype=torch.long)
        out = logprobs_and_entropy(logits, none, **asdict(region))
        assert all(part.shape == none.shape for part in out)
        assert grad(out.logprobs.sum() + out.entropy.sum(), logits)[0].shape == logits.shape
    stats = fused_linear_token_stats(hidden, weight, labels, [region], bias=bias)
    loss = fused_linear_loss(hidden, weight, labels, curved_loss, [region], bias=bias)
    assert stats.logprobs.shape == loss.losses.shape == loss.logprobs.shape == (0,)
    assert loss.total.item() == 0.0
    for total in (weighted(stats), loss.total):
        for leaf, gradient in zip(leaves, grad(total, *leaves), strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


# --- memory ---


class Allocations(TorchDispatchMode):
    """Notes the largest tensor, views counted as what they are views of."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {part.untyped_storage().data_ptr() for part in known}
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in tree_leaves(out):
            if isinstance(part, Tensor):
                storage = part.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.largest = max(self.largest, storage.nbytes() // part.element_size())
        return out


COUNT, WIDTH, VOCABULARY, CHUNK = 2048, 32, 4096, 512


@pytest.mark.parametrize(
    ("region", "spread"),
    [
        (WHOLE, 1.0),
        (Region(top_k=8), 1.0),
        (Region(top_p=0.5), 8.0),  # a narrow nucleus
        (Region(top_p=0.9), 1.0),  # a wide one
        (Region(min_p=0.01), 1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("inside", [True, False])
def test_the_fused_forms_never_hold_all_the_logits(
    region: Region, spread: float, inside: bool
) -> None:
    hidden, weight, _, labels = operands(COUNT, WIDTH, VOCABULARY, spread, torch.float32)
    memory = CHUNK * VOCABULARY * 4
    with Allocations() as allocations:
        if inside:
            total = fused_linear_loss(
                hidden, weight, labels, curved_loss, [region], memory=memory
            ).total
        else:
            stats = fused_linear_token_stats(hidden, weight, labels, [region], memory=memory)
            total = weighted(stats)
        gradients = grad(total, hidden, weight)
    assert all(gradient.any() for gradient in gradients)
    bound = max(CHUNK * VOCABULARY, VOCABULARY * WIDTH, COUNT * WIDTH)
    assert 4 * bound <= COUNT * VOCABULARY
    assert CHUNK * VOCABULARY <= allocations.largest <= bound


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("region", [WHOLE, Region(top_k=8), Region(top_p=0.5)], ids=str)
def test_the_gradient_may_take_the_place_of_the_logits(region: Region, temperature: float) -> None:
    *leaves, labels = operands(1024, 8, VOCABULARY, 8.0, torch.float32)
    logits = F.linear(*leaves).detach().requires_grad_()
    options = {**asdict(region), "temperature": temperature}
    kept = logits.detach().clone()
    plain = logprobs_and_entropy(logits, labels, **options)
    total = (plain.logprobs + plain.entropy).sum()
    (expected,) = grad(total, logits, retain_graph=True)
    assert torch.equal(logits, kept)
    assert torch.equal(grad(total, logits)[0], expected)  # a second time, from the same logits
    assert torch.equal(logits, kept)

    out = logprobs_and_entropy(logits, labels, **options, reuse_logits=True)
    assert torch.equal(logits, kept) and torch.equal(out.entropy, plain.entropy)
    total = (out.logprobs + out.entropy).sum()
    with Allocations(logits) as allocations:
        (gradient,) = grad(total, logits, retain_graph=True)
    assert 0 < allocations.largest < logits.numel()
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match="reuse_logits=True overwrote the logits"):
        grad(total, logits)
    assert torch.equal(logits, expected)  # the refused pass changed nothing


# --- mixed precision ---


def relative(mine: Tensor, theirs: Tensor) -> float:
    """Size of the difference in units of the size."""
    mine, theirs = mine.detach().double(), theirs.detach().double()
    return float((mine - theirs).norm() / theirs.norm())


@REGIONS
def test_autocast(region: Region) -> None:
    *leaves, labels = operands(200, 16, 300, dtype=torch.float32)
    hidden, weight, bias = leaves
    options = {"bias": bias, "memory": 64 * 300 * 2}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = F.linear(*leaves)
        assert logits.dtype == torch.bfloat16
        stats = fused_linear_token_stats(hidden, weight, labels, [region], **options)
        loss = fused_linear_loss(hidden, weight, labels, curved_loss, [region], **options)
    theirs = reference(logits.float(), labels, [region])
    outside = curved_loss(slice(0, 200), theirs)
    assert stats.logprobs.dtype == stats.entropies[region].scaled.dtype == torch.float32
    # The same bf16 products: but for a few that round the other way, the values are the same.
    assert relative(stats.logprobs, theirs.logprobs) < 1e-3
    assert relative(loss.losses, outside) < 1e-3
    for mine, total in ((weighted(stats), weighted(theirs)), (loss.total, outside.sum())):
        for got, wanted in zip(
            grad(mine, *leaves), grad(total, *leaves, retain_graph=True), strict=True
        ):
            assert got.dtype == torch.float32
            assert relative(got, wanted) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("chunk", [1, 64, 4096])
@pytest.mark.parametrize("inside", [True, False])
def test_gradients_of_bf16_weights_add_up_over_any_number_of_chunks(
    chunk: int, inside: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.rand(4096, 8, generator=generator) + 0.5).bfloat16()  # all of one sign
    weight = (0.1 * torch.randn(64, 8, generator=generator)).bfloat16().requires_grad_()
    bias = torch.zeros(64, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(4096, dtype=torch.long)
    options = {"bias": bias, "memory": chunk * 64 * 2}
    exact = [part.detach().double().requires_grad_() for part in (weight, bias)]
    logprobs = reference(F.linear(hidden.double(), *exact), labels, []).logprobs
    if inside:
        total = fused_linear_loss(
            hidden, weight, labels, lambda _, stats: stats.logprobs, [], **options
        ).total
    else:
        total = fused_linear_token_stats(hidden, weight, labels, [], **options).logprobs.sum()
    for mine, theirs in zip(grad(total, weight, bias), grad(logprobs.sum(), *exact), strict=True):
        # No more than the final sum's own rounding.
        assert relative(mine, theirs) < torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("value", [math.nan, -INF])
def test_an_undefined_row_has_no_region_of_the_whole_vocabulary(value: float) -> None:
    logits = torch.stack([torch.zeros(5), torch.full((5,), value)])
    out = logprobs_and_entropy(logits, torch.zeros(2, dtype=torch.long))
    assert out.region_size.tolist() == [5, 0]
    assert out.tail_mass[0] == 0.0 and out.tail_mass[1].isnan()


# --- bad input ---

Z, HIDDEN, WEIGHT = torch.zeros(2, 5), torch.zeros(2, 3), torch.zeros(5, 3)
LABELS = torch.tensor([0, 4])


def every_way(
    labels: Tensor, region: dict[str, Any] | None = None, **options: Any
) -> list[Callable[[], Any]]:
    region = region or {}
    return [
        lambda: logprobs_and_entropy(Z, labels, **region, **options),
        lambda: fused_linear_logprobs_and_entropy(HIDDEN, WEIGHT, labels, **region, **options),
        lambda: fused_linear_loss(
            HIDDEN, WEIGHT, labels, curved_loss, [Region(**region)], **options
        ),
    ]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2]), r"labels \[3\] must have the shape of the positions, \[2\]"),
        (torch.tensor([[0, 1]]), r"labels \[1, 2\] must have the shape of the positions, \[2\]"),
        (torch.tensor([0, 5]), r"between 0 and 5; the vocabulary has ids 0 to 4"),
        (torch.tensor([-100, 3]), r"between -100 and 3; .*leave out padding such as -100"),
        (torch.tensor([0.0, 1.0]), r"labels are torch\.float32; give token ids as int64"),
        (torch.tensor([True, False]), r"labels are torch\.bool; give token ids as int64"),
    ],
)
def test_bad_labels_are_refused(labels: Tensor, message: str) -> None:
    for call in every_way(labels):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, INF])
def test_a_bad_temperature_is_refused(temperature: float) -> None:
    for call in every_way(LABELS, temperature=temperature):
        with pytest.raises(
            ValueError, match=rf"temperature={temperature} must be positive and fin"
        ):
            call()


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"top_k": 2, "top_p": 0.9}, r"exactly one of .*, not top_k=2, top_p=0\.9, min_p=None"),
        ({"top_k": 2, "min_p": 0.9}, r"exactly one of .*, not top_k=2, top_p=None, min_p=0\.9"),
        ({"top_p": 0.8, "min_p": 0.9}, r"exactly one of .*, not top_k=None, top_p=0\.8, min_p"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": -1}, "top_k=-1 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0\.0 must lie between 0 and 1"),
        ({"top_p": 1.0}, r"top_p=1\.0 must lie between 0 and 1"),
        ({"top_p": math.nan}, "top_p=nan must lie between 0 and 1"),
        ({"min_p": 0.0}, r"min_p=0\.0 must lie between 0 and 1"),
        ({"min_p": 1.0}, r"min_p=1\.0 must lie between 0 and 1"),
        ({"min_p": math.nan}, "min_p=nan must lie between 0 and 1"),
    ],
)
def test_a_bad_region_is_refused(region: dict[str, Any], message: str) -> None:
    for call in (lambda: Region(**region), *every_way(LABELS, region)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(5, 4)}, r"hidden \[2, 3\] and weight \[5, 4\] do not fit"),
        ({"weight": torch.zeros(5)}, r"hidden \[2, 3\] and weight \[5\] do not fit"),
        ({"weight": torch.zeros(5, 3, 1)}, r"hidden \[2, 3\] and weight \[5, 3, 1\] do not fit"),
        ({"bias": torch.zeros(3)}, r"bias \[3\] must be \[5\]"),
        ({"bias": torch.zeros(5, 1)}, r"bias \[5, 1\] must be \[5\]"),
        ({"bias": torch.zeros(5).double()}, r"bias is torch\.float64 and weight torch\.float32"),
        ({"weight": torch.tensor(1.0)}, "no token axis"),
        ({"weight": WEIGHT.double()}, r"hidden is torch\.float32 and weight torch\.float64"),
        ({"hidden": HIDDEN.bfloat16()}, r"hidden is torch\.bfloat16 and weight torch\.float32"),
        ({"memory": 0}, "memory=0 must be at least 1 byte"),
        ({"memory": -5}, "memory=-5 must be at least 1 byte"),
    ],
)
def test_bad_operands_are_refused(changed: dict[str, Any], message: str) -> None:
    options = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | changed
    with pytest.raises(ValueError, match=message):
        fused_linear_logprobs_and_entropy(**options)
    with pytest.raises(ValueError, match=message):
        fused_linear_loss(**options, loss=curved_loss, regions=[])
