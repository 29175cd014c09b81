"""Time and memory of the fused ops beside what is usually done, in one run.

    python benchmarks/entropy_op.py --out runs/entropy_op             # everything, some 20 minutes
    python benchmarks/entropy_op.py --out runs/entropy_op --quick     # small sizes, a minute

Prints tables; writes ``entropy_op.json`` and, where matplotlib is installed, ``entropy_op.png``.
Competitors take turns within a repetition and the table shows medians, so that a slow minute hits
all of them. Times are in units of one read of the logits (a maximum over each row, and a copy).

* published: plain torch, as entropy methods are usually written: log-softmax for the
  log-probability; for the entropy a softmax over the top k logits, the 256 most probable tokens cut
  at mass P, or ``logsumexp - sum(p * logits)``. Its nucleus is not exact beyond 256 tokens.
* trl: ``selective_log_softmax`` and ``entropy_from_logits`` of the installed trl, if any.
* Liger: the fused linear cross-entropy with entropy of the installed liger-kernel, only where
  benchmarks/gpu_check.py asks for it; that takes the first two tables to a GPU.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from tre_lightning.ops import Region, fused_linear_logprobs_and_entropy, logprobs_and_entropy
from tre_lightning.ops.functions import fused_linear_loss

REGIONS = {"TRE-K": Region(top_k=2), "TRE-P": Region(top_p=0.99), "full": Region()}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HIDDEN = 896  # of a 0.5B model
QWEN = {  # the shape of a 0.5B model of 152k tokens
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": HIDDEN,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
Fields = dict[str, Any]


def make_logits(kind: str, count: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Logits ``[N, V]``: flat, or with a power law of the rank as language models have."""
    torch.manual_seed(0)
    if kind == "flat":
        return torch.randn(count, vocabulary).to(dtype)
    rank = torch.arange(1.0, vocabulary + 1).log()[torch.randperm(vocabulary)]
    logits = torch.empty(count, vocabulary, dtype=dtype)
    for row in logits:
        steepness = torch.empty(1).uniform_(1.6, 6.0)
        row.copy_(20.0 - steepness * rank + 0.5 * torch.randn(vocabulary))
    return logits


def published(logits: Tensor, labels: Tensor, region: Region) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy in plain torch."""
    wide = logits.float()
    logprobs = wide.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if region.top_k is not None:
        log_q = wide.topk(region.top_k).values.log_softmax(-1)
        entropy = -(log_q.exp() * log_q).sum(-1) * math.log(wide.shape[-1]) / math.log(region.top_k)
    elif region.top_p is not None:
        p = wide.softmax(-1).topk(256).values
        kept = p * (p.cumsum(-1) - p < region.top_p)
        q = kept / kept.sum(-1, keepdim=True)
        entropy = -(q * (q + 1e-12).log()).sum(-1)
    else:
        entropy = wide.logsumexp(-1) - (wide.softmax(-1) * wide).sum(-1)
    return logprobs, entropy


def trl_full(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of trl."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return selective_log_softmax(logits, labels), entropy_from_logits(logits)


def ours(logits: Tensor, labels: Tensor, region: Region) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of the op, the gradient in the logits' own memory."""
    out = logprobs_and_entropy(
        logits, labels, top_k=region.top_k, top_p=region.top_p, reuse_logits=True
    )
    return out.logprobs, out.entropy


def liger_full(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of liger-kernel, from hidden states."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    temperature, ignored, tiles, with_entropy = 1.0, -100, 1, True
    nll, entropy = Function.apply(hidden, weight, labels, temperature, ignored, tiles, with_entropy)
    return -nll, entropy


def why_no_liger(step: Callable[[], None]) -> str | None:
    """Why a step with :func:`liger_full` cannot be done here, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    try:
        step()
    except Exception as error:  # what a kernel raises depends on the card and on other packages
        said = str(error).strip().splitlines() or ["no reason given"]
        return f"liger-kernel does not run here: {type(error).__name__}: {said[0]}"
    return None


def once(function: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, *args: Any) -> None:
    """Forward and backward."""
    leaf = logits.detach().requires_grad_()
    logprobs, entropy = function(leaf, *args)
    torch.autograd.backward([logprobs.sum() + entropy.sum()])


def medians(
    competitors: dict[str, Callable[[], Any]], repetitions: int, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each; they take turns. On a GPU the first, which compiles, is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    warm_up = int(device == "cuda")
    for _ in range(warm_up + repetitions):
        for name, run in competitors.items():
            wait()
            started = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[warm_up:]) for name, times in seconds.items()}


def gpu_peaks(competitors: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Most MiB of GPU memory of each, above what is held before it."""
    peaks = {}
    for name, run in competitors.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return peaks


# ----- from logits


def time_logits(
    count: int, vocabulary: int, dtype: str, kind: str, repetitions: int, device: str = "cpu"
) -> Fields:
    """Units of one read of the logits, forward and backward."""
    with torch.device(device):
        logits = make_logits(kind, count, vocabulary, DTYPES[dtype])
        labels = torch.randint(vocabulary, (count,))
    # Ours overwrites the logits with their gradient, so it gets a copy, made outside the clock.
    work, spare = logits.clone(), logits.clone()
    sizes = logprobs_and_entropy(logits, labels, top_p=0.99).region_size.float()
    competitors: dict[str, Callable[[], Any]] = {
        "read": lambda: (logits.amax(-1), spare.copy_(logits)),
    }
    for name, region in REGIONS.items():
        competitors[f"refill {name}"] = lambda: work.copy_(logits)
        competitors[f"ours {name}"] = lambda region=region: once(ours, work, labels, region)
        competitors[f"published {name}"] = lambda region=region: once(
            published, logits, labels, region
        )
    if has_trl():
        competitors["trl full"] = lambda: once(trl_full, logits, labels)
    seconds = medians(competitors, repetitions, device)
    unit = seconds["read"]
    copies = [value for name, value in seconds.items() if name.startswith("refill")]
    fields = {} if device == "cpu" else {"peak_mib": gpu_peaks(competitors)}
    return {
        **fields,
        "N": count,
        "V": vocabulary,
        "dtype": dtype,
        "logits": kind,
        "nucleus": sizes.quantile(sizes.new_tensor([0.5, 0.9, 1.0])).tolist(),
        "read_ms": 1e3 * unit,
        "copy_ms": 1e3 * statistics.median(copies),
        "units": {n: s / unit for n, s in seconds.items() if not n.startswith(("read", "refill"))},
    }


def has_trl() -> bool:
    """Whether trl can be imported."""
    try:
        import trl.trainer.utils  # noqa: F401
    except ImportError:
        return False
    return True


# ----- from hidden states


def time_linear(
    count: int,
    vocabulary: int,
    dtype: str,
    repetitions: int,
    *,
    width: int = HIDDEN,
    region: Region = REGIONS["TRE-P"],
    device: str = "cpu",
    liger: bool = False,
) -> Fields:
    """Fused head beside its matrix products alone, forward and backward; with Liger where asked."""
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    with torch.device(device):
        # Logits of standard deviation 9: some nuclei of a few tokens, some of thousands.
        hidden = (9.0 * torch.randn(count, width)).to(kind).requires_grad_()
        weight = (torch.randn(vocabulary, width) / width**0.5).to(kind).requires_grad_()
        labels = torch.randint(vocabulary, (count,))
        given = torch.randn(count, vocabulary, dtype=kind)

    def step(function: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            function()

        return run

    def tuple_form() -> None:
        out = fused_linear_logprobs_and_entropy(
            hidden, weight, labels, top_k=region.top_k, top_p=region.top_p
        )
        (out.logprobs.sum() + out.entropy.sum()).backward()

    def loss_form() -> None:
        fused_linear_loss(
            hidden,
            weight,
            labels,
            lambda rows, stats: stats.logprobs + stats.entropies[region].scaled,
            [region],
        ).total.backward()

    def plain() -> None:
        logprobs, entropy = published(functional.linear(hidden, weight), labels, region)
        (logprobs.sum() + entropy.sum()).backward()

    def with_liger() -> None:
        logprobs, entropy = liger_full(hidden, weight, labels)
        (logprobs.sum() + entropy.sum()).backward()

    competitors = {
        "head alone": step(lambda: functional.linear(hidden, weight).backward(given)),
        "fused, loss inside": step(loss_form),
        "fused": step(tuple_form),
        "published": step(plain),
    }
    fields: Fields = {"N": count, "V": vocabulary, "D": width, "dtype": dtype}
    if liger:
        fields["no Liger"] = why_no_liger(step(with_liger))
        if fields["no Liger"] is None:
            competitors["Liger"] = step(with_liger)
    seconds = medians(competitors, repetitions, device)
    if device == "cuda":
        fields["peak_mib"] = gpu_peaks(competitors)
    with torch.no_grad():
        found = fused_linear_logprobs_and_entropy(hidden, weight, labels, top_p=0.99)
    sizes = found.region_size.float()
    fields["nucleus"] = sizes.quantile(sizes.new_tensor([0.5, 0.9, 1.0])).tolist()
    base = seconds["head alone"]
    shares = {name: value / base for name, value in seconds.items()}
    return {**fields, "head_s": base, "of the head": shares}


# ----- a whole update


def time_update(dtype: str, repetitions: int) -> Fields:
    """One micro-batch of a PPO update of a 0.5B model, with and without entropy."""
    from tre_lightning.batches import Rollout
    from tre_lightning.policy.actor_critic import ActorCritic, PolicyArgs
    from tre_lightning.policy.head import HeadOptions

    torch.manual_seed(0)
    model = ActorCritic.load(PolicyArgs(architecture=QWEN, critic="shared")).to(DTYPES[dtype])
    model.policy.base_model.norm.weight.data.fill_(15.0)  # logits as in time_linear
    ids, mask = torch.randint(1000, (4, 160)), torch.ones(4, 160, dtype=torch.bool)
    batch = Rollout(ids[:, :32], mask[:, :32], ids[:, 32:], mask[:, 32:], mask[:, 0])
    plain = HeadOptions((), temperature=1.0, memory=128 * 2**20, fused=False)

    def finish(total: Tensor, values: Tensor) -> None:
        (total + values.square().sum()).backward()
        model.zero_grad()

    def cross_entropy() -> None:
        outputs, values = model.outputs(batch, plain)
        finish(outputs.logprobs.sum(), values)

    def fused(regions: tuple[Region, ...]) -> None:
        asked = replace(plain, regions=regions, fused=True)

        def losses(rows: slice, outputs: Any) -> Tensor:
            parts = [outputs.entropy(region).scaled for region in regions]
            return torch.stack([outputs.logprobs, *parts])

        done, values = model.loss(batch, asked, losses)
        finish(done.total, values)

    seconds = medians(
        {
            "log-probabilities only, plain": cross_entropy,
            "log-probabilities only, fused": lambda: fused(()),
            "TRE-P, fused": lambda: fused((REGIONS["TRE-P"],)),
            "TRE-K and TRE-P, fused": lambda: fused((REGIONS["TRE-K"], REGIONS["TRE-P"])),
        },
        repetitions,
    )
    return {"dtype": dtype, "tokens": 4 * 128, "seconds": seconds}


# ----- memory, each in a process of its own


def measure_memory(what: str, count: int, vocabulary: int, dtype: str) -> float:
    """Peak of resident memory above the inputs (and gradients of hidden and weight), bytes."""
    kind, gradients = DTYPES[dtype], 0
    region = REGIONS[what.split()[1]]
    labels = torch.randint(vocabulary, (count,))
    if what.startswith("linear"):
        hidden = (9.0 * torch.randn(count, HIDDEN)).to(kind).requires_grad_()
        weight = (torch.randn(vocabulary, HIDDEN) / HIDDEN**0.5).to(kind).requires_grad_()
        gradients = (hidden.numel() + weight.numel()) * kind.itemsize

        def run() -> None:
            fused_linear_loss(
                hidden,
                weight,
                labels,
                lambda rows, stats: stats.logprobs + stats.entropies[region].scaled,
                [region],
            ).total.backward()

        warm = slice(0, 8)
        fused_linear_logprobs_and_entropy(
            hidden[warm].detach(), weight[:512].detach(), labels[warm] % 512
        )
    else:
        logits = make_logits("LLM-like", count, vocabulary, kind)
        function = {"ours": ours, "published": published}[what.split()[0]]
        once(function, logits[:2, :512].clone(), labels[:2] % 512, region)

        def run() -> None:
            once(function, logits, labels, region)

    inputs = (hidden, weight) if what.startswith("linear") else (logits,)
    for tensor in inputs:
        tensor.sum()  # brings pages back that the system has reclaimed meanwhile
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    run()
    peak = status("VmHWM")
    return float(peak - before - gradients)


def status(field: str) -> int:
    """A memory field of this process, bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def memory(what: str, count: int, vocabulary: int, dtype: str) -> Fields:
    """Peak memory of one op in a fresh process, in bytes and in sizes of the logits."""
    arguments = json.dumps([what, count, vocabulary, dtype])
    done = subprocess.run(
        [sys.executable, __file__, "--child", arguments], capture_output=True, text=True, check=True
    )
    extra = float(done.stdout)
    logits = count * vocabulary * DTYPES[dtype].itemsize
    fields = {"what": what, "N": count, "V": vocabulary, "dtype": dtype}
    return {**fields, "extra_mib": extra / 2**20, "extra_logits": extra / logits}


# ----- the report


def report(results: Fields, console: Console) -> None:
    """The tables."""
    head = results["machine"]
    console.print(f"{head['cpu']}, {head['threads']} threads, torch {head['torch']}")
    table = Table(title="forward + backward from logits, in reads of the logits (median)")
    for column in ("N", "V", "dtype", "logits", "nucleus 50/90/100 %", "read ms"):
        table.add_column(column)
    names = list(results["logits"][0]["units"])
    for name in names:
        table.add_column(name, justify="right")
    for row in results["logits"]:
        nucleus = cell(row["nucleus"])
        cells = [str(row[key]) for key in ("N", "V", "dtype", "logits")]
        units = [f"{row['units'][name]:.1f}" for name in names]
        table.add_row(*cells, nucleus, f"{row['read_ms']:.1f}", *units)
    console.print(table)
    for key, title in (("linear", "of the head"), ("update", "seconds")):
        if results[key]:
            table = Table(
                title={
                    "linear": "fused head, TRE-P, by the time of its matrix products",
                    "update": "a PPO micro-batch of 512 tokens, 0.5B model",
                }[key]
            )
            columns = [k for k in results[key][0] if k != title]
            for column in (*columns, *results[key][0][title]):
                table.add_column(column, justify="right")
            for row in results[key]:
                plain = [cell(row[c]) for c in columns]
                table.add_row(*plain, *(f"{value:.2f}" for value in row[title].values()))
            console.print(table)
    table = Table(title="peak memory above the inputs, in a process of its own")
    for column in ("what", "N", "V", "dtype", "MiB", "sizes of the logits"):
        table.add_column(column, justify="right")
    for row in results["memory"]:
        cells = [str(row[key]) for key in ("what", "N", "V", "dtype")]
        table.add_row(*cells, f"{row['extra_mib']:.0f}", f"{row['extra_logits']:.2f}")
    console.print(table)


def cell(value: Any) -> str:
    """A number or a list of sizes."""
    if isinstance(value, list):
        return "/".join(f"{size:.0f}" for size in value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def plot(results: Fields, file: Path) -> None:
    """Bars of the times from logits at the largest vocabulary, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    largest = max(row["V"] for row in results["logits"])
    rows = [row for row in results["logits"] if row["V"] == largest]
    rows = [row for row in rows if row["N"] == rows[0]["N"]]
    figure, axes = pyplot.subplots(1, len(rows), figsize=(3.2 * len(rows), 3.4), sharey=True)
    for axis, row in zip(list(axes) if len(rows) > 1 else [axes], rows, strict=True):
        names = list(row["units"])
        colours = ["tab:blue" if name.startswith("ours") else "tab:grey" for name in names]
        axis.bar(names, list(row["units"].values()), color=colours)
        axis.set(yscale="log", title=f"{row['logits']}, {row['dtype']}")
        axis.tick_params(axis="x", labelrotation=80)
    figure.supylabel("reads of the logits")
    figure.suptitle(f"N = {rows[0]['N']}, V = {largest}: forward + backward")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def machine() -> Fields:
    """What it ran on."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "trl": has_trl(),
    }


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/entropy_op"), help="a directory")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(measure_memory(*json.loads(options.child)))
        return
    counts, vocabularies = ([64], [32_000]) if options.quick else ([512, 2048], [32_000, 151_936])
    repetitions = options.repetitions
    results: Fields = {"machine": machine(), "repetitions": repetitions}
    results["logits"] = [
        time_logits(count, vocabulary, dtype, kind, repetitions)
        for kind in ("LLM-like", "flat")
        for dtype in DTYPES
        for vocabulary in vocabularies
        for count in counts
    ]
    results["linear"] = [
        time_linear(count, vocabularies[-1], dtype, repetitions)
        for dtype in DTYPES
        for count in counts
    ]
    dtypes = () if options.quick else tuple(DTYPES)
    results["update"] = [time_update(dtype, repetitions) for dtype in dtypes]
    results["memory"] = [
        memory(f"{way} {name}", counts[0], vocabularies[-1], dtype)
        for dtype in DTYPES
        for name in REGIONS
        for way in ("ours", "published")
    ] + [
        memory("linear TRE-P", count, vocabularies[-1], dtype)
        for dtype in DTYPES
        for count in (counts[0], 4 * counts[0], 16 * counts[0])
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "entropy_op.json").write_text(json.dumps(results, indent=1) + "\n")
    report(results, Console(width=200))
    plot(results, options.out / "entropy_op.png")


if __name__ == "__main__":
    main()
