"""The Triton kernels against plain torch in float64.

They run compiled where there is a GPU, else in Triton's interpreter. Triton decides at its import
whether it interprets, and other packages import it; so without a GPU the tests of the kernels run
in a child process, started by one test here.
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tre_lightning.entropy import Region
from tre_lightning.ops import scan as scan_module
from tre_lightning.ops import torch_rows
from tre_lightning.ops.region import RegionRows, Summary

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
SOURCES = Path(scan_module.__file__).parents[2]

kernels = pytest.mark.skipif(
    not INSTALLED or CUDA == INTERPRETED, reason="run on a GPU, or by test_in_the_interpreter"
)
SIZES = (1, 63, 64, 65, 1000, 5003)
KINDS = [(1.0, torch.float32), (0.7, torch.float32), (0.7, torch.bfloat16), (1.0, torch.float16)]
# The nucleus of a flat row of SIZES does not end where rounding decides.
NUCLEUS, TOP_K, MIN_P = Region(top_p=0.9003), Region(top_k=300), Region(min_p=0.0503)


@pytest.fixture
def rows() -> ModuleType:
    return importlib.import_module("tre_lightning.ops.triton_rows")


@pytest.mark.skipif(not INSTALLED or CUDA or INTERPRETED, reason="needs Triton and no GPU")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout  # and not all of them skipped


def test_the_cpu_does_without_triton(tmp_path: Path) -> None:
    """Even where it is installed: this one cannot be imported."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('imported on the CPU')\n")
    code = """
import importlib.util, sys, torch, tre_lightning
from tre_lightning.ops.region import Region
from tre_lightning.ops.scan import d_logits, scan
assert importlib.util.find_spec("triton").origin.startswith(sys.argv[1])
logits, labels, ones = torch.zeros(2, 1000), torch.tensor([3, 4]), torch.ones(2)
result = scan(logits, labels, [Region(top_p=0.9003)], 1.0)
assert result.regions[0].size.tolist() == [901, 901]
d_logits(logits, labels, result, ones, [ones], 1.0, logits)
assert not {"triton", "tre_lightning.ops.triton_rows"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": path(str(tmp_path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@kernels
@pytest.mark.parametrize(("temperature", "dtype"), KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_summary(rows: ModuleType, size: int, temperature: float, dtype: torch.dtype) -> None:
    logits = some_logits(size, dtype)
    expected = torch_rows.summarise(logits.double(), temperature)
    summary = rows.summarise(logits, temperature)
    for name in ("log_norm", "entropy"):
        close(getattr(summary, name), getattr(expected, name))
        assert getattr(summary, name).isnan().tolist() == [False] * 5 + [True] * 2
    close(summary.block_mass[:5], expected.block_mass[:5])
    # A last bit off, and a tie between two blocks would go unseen.
    same = torch_rows.summarise(logits, temperature).block_max
    assert summary.block_max[:5].equal(same[:5])


@kernels
def test_summary_of_logits_far_from_zero(rows: ModuleType) -> None:
    """A sum of exp(x) * x would lose the entropy; a maximum of 0 would lose everything."""
    logits = torch.full((2, 130), -1e4, device=DEVICE)
    logits[1] = -math.inf
    logits[1, 64:66] = -1e30
    log_norm, entropy, _, block_mass = rows.summarise(logits, 1.0)
    close(log_norm, torch.tensor([math.log(130) - 1e4, -1e30]))
    close(entropy, torch.tensor([130.0, 2.0]).log())
    close(block_mass, torch.tensor([[64 / 130, 64 / 130, 2 / 130], [0.0, 1.0, 0.0]]))


@kernels
@pytest.mark.parametrize(
    ("size", "temperature", "dtype"),
    [
        (1, 1.0, torch.float32),
        (65, 0.7, torch.float32),
        (1000, 1.0, torch.bfloat16),
        (1000, 1.0, torch.float16),
        (1000, 0.7, torch.float32),
        (8713, 0.7, torch.bfloat16),
        (5003, 1.0, torch.float32),
    ],
)
@pytest.mark.parametrize("region", [NUCLEUS, TOP_K, MIN_P])
def test_wide_regions(
    rows: ModuleType, region: Region, size: int, temperature: float, dtype: torch.dtype
) -> None:
    logits = some_logits(size, dtype)[:5]
    expected, found = empty_regions(logits.double()), empty_regions(logits)
    order = torch.tensor([4, 0, 1, 3], device=DEVICE)
    summary = torch_rows.summarise(logits, temperature)
    rows.read(logits, temperature, summary, region, order, found)
    exact = torch_rows.summarise(logits.double(), temperature)
    torch_rows.read(logits.double(), temperature, exact, region, order, expected)
    assert found.size.equal(expected.size)
    assert found.last.equal(expected.last)
    for name in ("threshold", "mass", "tail_mass", "entropy"):
        close(getattr(found, name), getattr(expected, name))
    assert found.wide.all()
    assert found.size[2] == 0 and found.mass[2].isnan()  # a row that was not asked for


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("region", [Region(top_k=600), Region(top_p=0.5995)])
def test_ties_enter_by_token_id(rows: ModuleType, region: Region, dtype: torch.dtype) -> None:
    """All tokens at 0, half of them as -0; then 600 odd ids at -100, and token 0 above them."""
    logits = torch.zeros(2, 1200, dtype=dtype, device=DEVICE)
    logits[0, 1::2] = -0.0
    logits[1, ::2], logits[1, 1::2], logits[1, 0] = -200.0, -100.0, -99.0
    found = find_wide(rows, logits, region)
    # Row 1 by top_p: token 0 has e / (e + 600), so that 358.6 tokens at -100 are wanted.
    sizes, last = ([600, 600], [599, 1197]) if region.top_k else ([720, 360], [719, 717])
    assert found.size.tolist() == sizes
    assert found.last.tolist() == last
    assert found.threshold.tolist() == [0.0, -100.0]
    mass = [1.0 / 1200, 1.0 / (math.e + 600)]
    close(found.mass, torch.tensor([sizes[0] * mass[0], (math.e + sizes[1] - 1) * mass[1]]))
    close(
        found.tail_mass,
        torch.tensor([(n - s) * m for n, s, m in zip([1200, 601], sizes, mass, strict=True)]),
    )


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_that_tie_at_the_edge_of_min_p_enter_together(
    rows: ModuleType, dtype: torch.dtype
) -> None:
    """All of 700 tokens tie, half of them as -0; then 350 at -4 lie at the edge, the rest below."""
    logits = torch.zeros(2, 700, dtype=dtype, device=DEVICE)
    logits[0, 1::2] = -0.0
    logits[1, ::2], logits[1, 1::2] = -4.0, -4.25
    logits[1, 0] = 0.0
    found = find_wide(rows, logits, Region(min_p=math.exp(-4.0)))
    assert found.size.tolist() == [700, 350]
    assert found.last.tolist() == [699, 699]
    tail = 350 * math.exp(-4.25)
    close(found.tail_mass, torch.tensor([0.0, tail / (tail + 1 + 349 * math.exp(-4.0))]))
    close(found.entropy[0], torch.tensor(math.log(700)))


@kernels
def test_tokens_at_minus_infinity_are_in_no_region(rows: ModuleType) -> None:
    """With fewer tokens than top_k, and where rounding keeps the mass under top_p."""
    logits = torch.full((2, 700), -math.inf, device=DEVICE)
    logits[0, ::7] = -300.0
    logits[1, ::7] = torch.linspace(-1.0, 1.0, 100, device=DEVICE)
    for region in (Region(top_k=500), Region(top_p=1.0 - 1e-12), Region(min_p=0.1)):
        summary = rows.summarise(logits, 1.0)
        # A norm that is a little too large, for want of worse rounding.
        summary = summary._replace(log_norm=summary.log_norm + 1e-3)
        found = find_wide(rows, logits, region, summary)
        assert found.size.tolist() == [100, 100]
        if region.min_p is None:
            assert found.threshold.tolist() == [-300.0, -1.0]
        assert found.last.tolist() == [699, 699]
        close(found.mass, torch.ones(2))
        close(found.entropy[0], torch.tensor(math.log(100)))


@kernels
@pytest.mark.parametrize(("temperature", "dtype"), KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_gradient(rows: ModuleType, size: int, temperature: float, dtype: torch.dtype) -> None:
    logits = some_logits(size, dtype)
    arguments = some_gradients(torch_rows, logits.double(), temperature)
    expected = torch.empty_like(logits, dtype=torch.float64)
    torch_rows.gradient(logits.double(), temperature, *arguments, expected)
    assert expected[5:].isnan().all()
    assert expected[:5].isfinite().all()
    arguments = some_gradients(rows, logits, temperature)
    out = torch.full_like(logits, 7.0)
    rows.gradient(logits, temperature, *arguments, out)
    # One rounding of a sum in float32, by half a unit in the last place; the interpreter cuts off
    # instead. float16 has no normal numbers under 2^-14: there a unit is 2^-24.
    unit = torch.finfo(dtype).eps * (1.0 if INTERPRETED else 0.5)
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0
    assert_close(out.double(), expected, rtol=unit + 1e-5, atol=tiny + 2e-7, equal_nan=True)
    masked = logits[:5] == -math.inf
    masked[:, arguments[1][:5].flatten()] = False
    assert (out[:5][masked] == 0).all()
    rows.gradient(logits, temperature, *arguments, logits)  # in place
    assert_close(logits, out, rtol=0.0, atol=0.0, equal_nan=True)


@kernels
def test_what_is_added_at_tokens_is_rounded_once(rows: ModuleType) -> None:
    """p * f = -1 + 2^-10 rounds to -1 in bfloat16; with the 1 that is added 2^-10 must remain."""
    logits = torch.full((1, 300), -math.inf, dtype=torch.bfloat16, device=DEVICE)
    logits[0, 200] = 0.0
    log_norm = torch.tensor([-math.log(1.0 - 2.0**-10)], device=DEVICE)
    # More tokens than one program compares; the sum for token 200 comes from both ends.
    ids = torch.zeros(1, 131, dtype=torch.int64, device=DEVICE)
    at_ids = torch.zeros(1, 131, device=DEVICE)
    ids[0, [0, 7, 130]] = 200
    at_ids[0, 0], at_ids[0, 130] = 0.25, 0.75
    rows.gradient(logits, 1.0, log_norm, ids, at_ids, -torch.ones_like(log_norm), [], logits)
    assert logits[0, 200].item() == pytest.approx(2.0**-10, rel=1e-2)
    assert logits.count_nonzero() == 1


@kernels
def test_no_rows(rows: ModuleType) -> None:
    logits = torch.empty(0, 100, device=DEVICE)
    summary = rows.summarise(logits, 1.0)
    assert [tuple(part.shape) for part in summary] == [(0,), (0,), (0, 2), (0, 2)]
    none = torch.empty(0, 1, dtype=torch.int64, device=DEVICE)
    rows.read(logits, 1.0, summary, NUCLEUS, none.squeeze(1), empty_regions(logits))
    norm = summary.log_norm
    rows.gradient(logits, 1.0, norm, none, none.float(), norm, [], logits)


@kernels
def test_float64_is_computed_in_float64(rows: ModuleType) -> None:
    logits = some_logits(1000, torch.float32)[:5].double()
    expected = torch_rows.summarise(logits, 0.7)
    for part, same in zip(rows.summarise(logits, 0.7), expected, strict=True):
        assert_close(part, same, rtol=1e-14, atol=0.0, equal_nan=True)
    found, same = (empty_regions(logits) for _ in range(2))
    order = torch.arange(2, device=DEVICE)
    rows.read(logits, 0.7, expected, NUCLEUS, order, found)
    torch_rows.read(logits, 0.7, expected, NUCLEUS, order, same)
    assert_close(found.entropy, same.entropy, rtol=1e-14, atol=0.0, equal_nan=True)
    arguments = some_gradients(torch_rows, logits, 0.7)
    out, same_out = torch.empty_like(logits), torch.empty_like(logits)
    rows.gradient(logits, 0.7, *arguments, out)
    torch_rows.gradient(logits, 0.7, *arguments, same_out)
    assert_close(out, same_out, rtol=1e-14, atol=0.0)


@kernels
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_same_through_scan(
    rows: ModuleType, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Candidates and wide regions side by side; on a GPU, the kernels are what scan chooses."""
    logits = some_logits(5003, torch.float32)[:5]
    if CUDA:
        assert scan_module._backend(logits) is rows
    labels = torch.tensor([5, 0, 7, 5002, 1], device=DEVICE)
    regions = [NUCLEUS, Region(top_k=20), Region(), MIN_P]
    slopes = torch.linspace(0.5, 1.5, 5, device=DEVICE)
    monkeypatch.setattr(scan_module, "_backend", lambda logits: rows)
    found = scan_module.scan(logits, labels, regions, temperature)
    got = torch.full_like(logits, 7.0)
    scan_module.d_logits(logits, labels, found, slopes, [slopes] * 4, temperature, got)
    monkeypatch.setattr(scan_module, "_backend", lambda logits: torch_rows)
    exact = logits.double()
    expected = scan_module.scan(exact, labels, regions, temperature)
    wanted = torch.empty_like(exact)
    many = [slopes.double()] * 4
    scan_module.d_logits(exact, labels, expected, many[0], many, temperature, wanted)
    for region in (expected.regions[0], expected.regions[3]):
        assert set(region.wide.tolist()) == {True, False}
    for part, same in zip(found.regions, expected.regions, strict=True):
        assert part.size.equal(same.size)
        assert part.wide.equal(same.wide)
        close(part.entropy, same.entropy)
        close(part.tail_mass, same.tail_mass)
    close(found.logprobs, expected.logprobs)
    close(found.full_entropy, expected.full_entropy)
    close(got, wanted, atol=1e-6)


@pytest.mark.skipif(not CUDA or not INSTALLED, reason="needs a GPU and Triton")
def test_more_than_2_to_the_31_logits(rows: ModuleType) -> None:
    """Offsets of 32 bits would read and write the first rows instead of the last."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    count, vocabulary = 2**11 + 2, 2**20
    logits = torch.zeros(count, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, ::2] = -math.inf
    labels = torch.ones(count, dtype=torch.int64, device=DEVICE)
    result = scan_module.scan(logits, labels, [NUCLEUS], 1.0)
    close(result.full_entropy[-2:], torch.tensor([vocabulary, vocabulary / 2]).log())
    wide = torch.tensor([math.ceil(0.9 * vocabulary), math.ceil(0.45 * vocabulary)])
    assert_close(result.regions[0].size[-2:].cpu(), wide, rtol=1e-5, atol=0)
    ones = torch.ones(count, device=DEVICE)
    scan_module.d_logits(logits, labels, result, ones, [None], 1.0, logits)
    assert logits[-1, 1] == 1.0 and logits[-1, -1] < 0.0 and logits[-1, -2] == 0.0
    assert logits[0, 0] < 0.0


def some_logits(size: int, dtype: torch.dtype) -> Tensor:
    """Rows: any, with -inf, peaked, tied, flat; with NaN; nothing but -inf."""
    logits = 2.0 * torch.randn(7, size, generator=torch.Generator().manual_seed(size))
    logits[1, 1::3] = -math.inf
    logits[1, 4096:] = -math.inf  # all of a tile
    logits[2, size // 2] = 30.0
    logits[3] = logits[3].round()
    logits[4] = 0.3
    logits[5, size // 3] = math.nan
    logits[6] = -math.inf
    return logits.to(dtype).to(DEVICE)


def some_gradients(backend: ModuleType, logits: Tensor, temperature: float) -> tuple:
    """Arguments of gradient, with a nucleus that is wide in some rows, and the whole vocabulary."""
    count, size = logits.shape
    summary = backend.summarise(logits, temperature)
    nucleus, whole = empty_regions(logits), empty_regions(logits)
    order = torch.tensor([0, 1, 3, 4], device=DEVICE)
    backend.read(logits, temperature, summary, NUCLEUS, order, nucleus)
    nucleus.wide[2] = False
    nucleus.threshold[2] = 0.0
    whole.threshold.fill_(-math.inf)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size, (count, 5), generator=generator)
    ids[:, 3] = ids[:, 0]  # the label in the region
    ids[:, 4] = ids[:, 1]  # padding
    numbers = torch.randn(count, 10, generator=generator).to(summary.log_norm)
    at_ids = numbers[:, :5].contiguous()
    at_ids[:, 4] = 0.0
    factor, *slopes = numbers[:, 5:].unbind(1)
    wide = [(nucleus, slopes[0], slopes[1]), (whole, slopes[2], slopes[3])]
    return summary.log_norm, ids.to(DEVICE), at_ids, factor, wide


def empty_regions(logits: Tensor) -> RegionRows:
    """What read finds: every row wide, and nothing known of it."""
    count, size = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    values = [logits.new_full((count,), math.nan, dtype=dtype) for _ in range(4)]
    return RegionRows(
        entropy=values[0],
        size=torch.zeros(count, dtype=torch.int64, device=DEVICE),
        mass=values[1],
        tail_mass=values[2],
        threshold=values[3],
        last=torch.full((count,), size - 1, dtype=torch.int64, device=DEVICE),
        ids=torch.zeros(count, 1, dtype=torch.int64, device=DEVICE),
        wide=torch.ones(count, dtype=torch.bool, device=DEVICE),
    )


def find_wide(
    rows: ModuleType, logits: Tensor, region: Region, summary: Summary | None = None
) -> RegionRows:
    """The regions of all rows."""
    found = empty_regions(logits)
    order = torch.arange(len(logits), device=DEVICE)
    rows.read(logits, 1.0, summary or rows.summarise(logits, 1.0), region, order, found)
    return found


def close(found: Tensor, expected: Tensor, atol: float = 3e-6) -> None:
    """Equal up to float32's rounding of sums of logits and of thousands of probabilities."""
    assert_close(
        found.double().cpu(), expected.double().cpu(), rtol=2e-6, atol=atol, equal_nan=True
    )


def path(*first: str) -> str:
    """Where a child process finds the sources, after ``first``."""
    return os.pathsep.join([*first, str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
