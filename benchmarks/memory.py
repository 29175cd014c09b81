"""Memory and time of a PPO iteration: a model of both beside measurements, and what it predicts.

    python benchmarks/memory.py --out runs/memory             # some 6 minutes on one core
    python benchmarks/memory.py --out runs/memory --quick     # one small model
    python benchmarks/memory.py --out runs/memory --tables    # predictions only, no measurement

Prints tables; writes ``memory.json``. Every measurement is the peak resident memory of a fresh
process that runs two whole iterations (the optimiser has no state before the first), less what the
process held before the model was read. Times are processor seconds of the second iteration, on one
thread, so that other processes on the machine matter little. A Qwen3 with random weights, float32,
AdamW, no reference; no response ends early.

Both models are pure functions in ``tre_lightning.training.memory_model``.
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from ppo_step import GRPO, RESPONSES, Setting, run_ours, save_model, show
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from tre_lightning.training.memory_model import (
    GIB,
    MIB,
    SHAPES,
    Device,
    Model,
    Run,
    device_seconds,
    evaluation_flops,
    peak_bytes,
    sampling_flops,
    update_flops,
)

Fields = dict[str, Any]


# ----- measurements

SIZES = {
    "10m": Setting(4, 16, 48, 8192, 256, 6, 4, 4),
    "40m": Setting(4, 16, 48, 8192, 512, 10, 8, 4),
    "100m": Setting(4, 16, 48, 16384, 768, 10, 12, 4),
}
CASES: tuple[tuple[str, Fields], ...] = (
    ("10m", {"critic": "none"}),
    ("10m", {"critic": "separate"}),
    ("40m", {"critic": "none"}),
    ("40m", {"critic": "shared"}),
    ("40m", {"critic": "separate"}),
    ("40m", {"critic": "separate", "checkpointing": True}),
    ("40m", {"critic": "separate", "lora_rank": 16}),
    ("100m", {"critic": "none"}),
    ("100m", {"critic": "separate"}),
)
MINIBATCHES, MICRO_BATCHES = 2, 2  # an iteration, and each of these


def run_of(size: str, **fields: Any) -> Run:
    """The measured run: all responses are sampled at once."""
    setting = SIZES[size]
    model = Model(
        setting.layers,
        setting.hidden,
        3 * setting.hidden,
        setting.heads,
        setting.key_value_heads,
        setting.vocabulary,
        normed_heads=True,
    )
    return Run(
        model,
        setting.rows,
        setting.rows // MINIBATCHES // MICRO_BATCHES,
        setting.prompt_tokens,
        setting.new_tokens,
        **fields,
    )


def do_job(job: Fields) -> None:
    """In the fresh process: two iterations, their peak and the second one's processor seconds."""
    from tre_lightning.policy.lora import LoraArgs

    how = job["how"]
    before = [0]

    def about_to_start() -> None:
        tiny = AutoConfig.for_model(  # what transformers and torch load at the first use
            "qwen3",
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
        )
        model = AutoModelForCausalLM.from_config(tiny)
        model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
        torch.optim.AdamW(model.parameters()).step()
        before[0] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    rank = how.get("lora_rank", 0)
    if rank:
        importlib.import_module("peft")  # not what is measured
    found = run_ours(
        GRPO,
        SIZES[job["size"]],
        job["model"],
        "cpu",
        iterations=2,
        detailed=True,
        policy={
            "critic": how["critic"],
            "gradient_checkpointing": how.get("checkpointing", False),
            "lora": LoraArgs(rank=rank) if rank else None,
        },
        ppo={
            "estimator": "grpo" if how["critic"] == "none" else "gae",
            "num_minibatches": MINIBATCHES,
            "micro_batch_size": run_of(job["size"]).micro_rows,
        },
        about_to_start=about_to_start,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parts = {name: seconds for name, (_, seconds) in found["parts"][-1].items()}
    fields = {"before": before[0] * 1024, "peak": (peak - before[0]) * 1024, "parts": parts}
    Path(job["result"]).write_text(json.dumps(fields))


def measure(size: str, how: Fields, model: str) -> Fields:
    """Run a case in a fresh process.

    Raises:
        RuntimeError: if it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        job = {"size": size, "how": how, "model": model, "result": str(result)}
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{size}, {how} failed:\n{done.stderr[-3000:]}")
        fields: Fields = json.loads(result.read_text())
        return fields


def compared(cases: Sequence[tuple[str, Fields]]) -> Iterator[tuple[Fields, Fields]]:
    """Rows of both tables, memory and time, of every case."""
    for size, how in cases:
        with tempfile.TemporaryDirectory() as directory:
            save_model(SIZES[size], Path(directory))
            found = measure(size, how, directory)
        run = run_of(size, **how)
        expected = peak_bytes(run)
        states = sum(expected[name] for name in ("weights", "gradients", "moments"))
        case = {
            "size": size,
            "critic": how["critic"],
            "with": ", ".join(name for name in how if name != "critic") or "-",
        }
        memory = {
            **case,
            "states, MiB": round(states / MIB),
            "activations": round(expected["activations"] / MIB),
            "logits": round(expected["logits"] / MIB),
            "cache": round(expected["cache"] / MIB),
            "predicted peak": round(expected["peak"] / MIB),
            "measured peak": round(found["peak"] / MIB),
            "measured / predicted": found["peak"] / expected["peak"],
        }
        prompts = SIZES[size].prompts
        flops = {
            "sampling": sampling_flops(run, run.rows, prompts),
            "evaluation pass": evaluation_flops(run, run.rows),
            "update": update_flops(run, run.rows),
        }
        seconds = {name: found["parts"][name] for name in flops}
        time: Fields = dict(case)
        for name in flops:
            time[f"{name}, GFLOP"] = round(flops[name] / 1e9)
            time[f"{name}, CPU s"] = seconds[name]
            time[f"{name}, GFLOP/s"] = flops[name] / 1e9 / seconds[name]
            time[f"{name}, predicted fraction"] = flops[name] / sum(flops.values())
            time[f"{name}, fraction"] = seconds[name] / sum(seconds.values())
        yield memory, time


# ----- predictions

QWEN = {
    "1.5B": SHAPES["Qwen/Qwen2.5-1.5B-Instruct"],
    "7B": SHAPES["Qwen/Qwen2.5-7B-Instruct"],
    "70B (72B)": SHAPES["Qwen/Qwen2.5-72B-Instruct"],
}
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 128, 512, 2048


def predictions() -> Iterator[tuple[Fields, Fields]]:
    """Memory and time of large models; separate critic, checkpointing, 1 response a micro-batch."""
    for name, model in QWEN.items():
        for devices in (1, 8, 16, 64):
            responses = PROMPTS * RESPONSES
            run = Run(
                model,
                rows=min(16, responses // devices),
                micro_rows=1,
                prompt_tokens=PROMPT_TOKENS,
                new_tokens=NEW_TOKENS,
                checkpointing=True,
                mixed=True,
                devices=devices,
            )
            peak = peak_bytes(run)
            case = {"model": name, "devices": devices}
            states = sum(peak[part] for part in ("weights", "gradients", "moments"))
            lora = peak_bytes(replace(run, lora_rank=16))
            memory = {
                **case,
                "states, GiB": states / GIB,
                "gathered policy": peak["gathered policy"] / GIB,
                "gathered layers": peak["gathered layers"] / GIB,
                "activations": peak["activations"] / GIB,
                "logits": peak["logits"] / GIB,
                "cache": peak["cache"] / GIB,
                "peak": peak["peak"] / GIB,
                "peak, no critic": peak_bytes(replace(run, critic="none"))["peak"] / GIB,
                "peak, LoRA": lora["peak"] / GIB,
            }
            seconds = device_seconds(run, responses, PROMPTS, Device())
            yield memory, {**case, **seconds, "iteration, s": sum(seconds.values())}


def main() -> None:
    """Measure, compare, predict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/memory"), help="a directory")
    parser.add_argument("--quick", action="store_true", help="one small model")
    parser.add_argument("--tables", action="store_true", help="predictions only")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return do_job(json.loads(options.job))
    console = Console(width=180)
    results: Fields = {"load": os.getloadavg()[0], "torch": torch.__version__}
    results["device"] = asdict(Device())
    cases = CASES[:1] if options.quick else CASES
    if not options.tables:
        memory, time = zip(*compared(cases), strict=True)
        results |= {"measured": memory, "time": time}
        show("peak of two iterations, MiB", memory, console)
        show("second iteration, processor seconds", time, console)
    memory, time = zip(*predictions(), strict=True)
    results |= {"predicted": memory, "predicted_time": time}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory.json").write_text(json.dumps(results, indent=1) + "\n")
    show("predicted, GiB a device", memory, console)
    show("predicted, seconds", time, console)


if __name__ == "__main__":
    main()
