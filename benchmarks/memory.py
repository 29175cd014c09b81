"""Memory and time of a PPO iteration: a model of both beside measurements, and what it predicts.

    python benchmarks/memory.py --out runs/memory             # some 6 minutes on one core
    python benchmarks/memory.py --out runs/memory --quick     # one small model
    python benchmarks/memory.py --out runs/memory --tables    # predictions only, no measurement

Prints tables; writes ``memory.json``. Every measurement is the peak resident memory of a fresh
process that runs two whole iterations (the optimiser has no state before the first), less what the
process held before the model was read. Times are processor seconds of the second iteration, on one
thread, so that other processes on the machine matter little. A Qwen3 with random weights, float32,
AdamW, no reference; no response ends early.

The model of memory counts weights, gradients, AdamW's moments, activations kept for the backward
pass, one chunk of logits, and in sampling the key-value cache. That of time counts multiplications
and additions of matrix products and attention. Both are pure functions below; they leave out what
is small, and any communication between devices.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from ppo_step import GRPO, RESPONSES, Setting, run_ours, save_model, show
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

MIB, GIB = 2**20, 2**30
LOGITS = 128 * MIB  # ppo.logits_memory
Critic = Literal["separate", "shared", "none"]
Fields = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """Shape of a Qwen2- or Qwen3-like transformer."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = False  # the head is the embedding
    normed_heads: bool = False  # queries and keys are normalised, as in Qwen3

    @property
    def attention(self) -> int:
        """Numbers in the queries of a token."""
        return self.hidden

    @property
    def keys(self) -> int:
        """Numbers in the keys of a token, and in its values."""
        return self.hidden // self.heads * self.key_value_heads

    @property
    def layer_weights(self) -> int:
        """Parameters of a layer's matrices."""
        attention = 2 * self.hidden * (self.attention + self.keys)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def trunk(self) -> int:
        """Parameters in matrix products of the trunk."""
        return self.layers * self.layer_weights

    @property
    def table(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def policy(self) -> int:
        """Parameters of the language model (norms and biases left out)."""
        return self.trunk + (1 if self.tied else 2) * self.table


@dataclass(frozen=True)
class Run:
    """What is held and done in an iteration, on one of ``devices`` that share it evenly."""

    model: Model
    rows: int  # responses on a device that are sampled at a time
    micro_rows: int  # responses in a forward and backward pass
    prompt_tokens: int
    new_tokens: int
    critic: Critic = "separate"
    checkpointing: bool = False
    lora_rank: int = 0  # 0 = all weights are trained
    mixed: bool = False  # products in bfloat16 over float32 weights (bf16-mixed)
    devices: int = 1  # over which weights and optimiser are sharded (FSDP2); not with adapters

    @property
    def tokens(self) -> int:
        """Of a prompt and its response."""
        return self.prompt_tokens + self.new_tokens

    @property
    def sharded(self) -> bool:
        """With adapters, every device holds all weights (DDP)."""
        return self.devices > 1 and not self.lora_rank


# ----- memory, bytes


def trained_and_frozen(run: Run) -> tuple[int, int]:
    """Parameters that are trained, and that are only held.

    A separate critic is a copy of the trunk and the embedding. With adapters it shares the frozen
    weights.
    """
    model = run.model
    copies = 2 if run.critic == "separate" else 1
    if run.lora_rank:
        d, a, k, i = model.hidden, model.attention, model.keys, model.intermediate
        sides = (d + a) + 2 * (d + k) + (a + d) + 2 * (d + i) + (i + d)
        return copies * model.layers * run.lora_rank * sides, model.policy
    return model.policy + (copies - 1) * (model.trunk + model.table), 0


def state_bytes(run: Run) -> dict[str, float]:
    """Of one device: weights, gradients and AdamW's two moments, all float32.

    Frozen weights are float32 without mixed precision, and bfloat16 with it
    (``lora.bfloat16_base``).
    """
    trained, frozen = trained_and_frozen(run)
    share = 1 / run.devices if run.sharded else 1.0
    return {
        "weights": share * (4 * trained + (2 if run.mixed else 4) * frozen),
        "gradients": share * 4 * trained,
        "moments": share * 8 * trained,
    }


def activation_floats(model: Model) -> int:
    """Numbers that a layer keeps of a token for its backward pass.

    Of each norm its input, the normalised and the scaled vector; queries before and after rotation
    (and of normalised heads two more, likewise of keys), keys and values repeated for all heads,
    the attention's output; in the MLP the gate, its activation, the other branch and the product.
    """
    norms = 6 * model.hidden
    heads = 2 * (model.attention + model.keys) if model.normed_heads else 0
    attention = 4 * model.attention
    return norms + heads + attention + 4 * model.intermediate


def activation_bytes(run: Run) -> float:
    """Kept in the forward pass of a micro-batch, by policy and separate critic at once.

    With checkpointing: of each layer its input, and of one layer everything. Mixed precision halves
    all but the norms, which run in float32.
    """
    model, tokens = run.model, run.micro_rows * run.tokens
    width = 2.0 if run.mixed else 4.0
    layer = width * activation_floats(model) + (2 * 6 * model.hidden if run.mixed else 0)
    of_token = model.layers * layer
    if run.checkpointing:
        of_token = model.layers * width * model.hidden + layer
    return tokens * of_token * (2 if run.critic == "separate" else 1)


def logits_bytes(run: Run) -> float:
    """A chunk of logits and its working copy, in float32."""
    tokens = run.micro_rows * run.new_tokens
    return 2.0 * min(LOGITS, 4 * tokens * run.model.vocabulary)


def sampling_bytes(run: Run) -> dict[str, float]:
    """Key-value cache, with a layer's copy while it grows, and the next token's distribution.

    That takes 12 bytes a token of the vocabulary: logits twice and probabilities, in float32. A
    sharded policy is gathered whole.
    """
    model, width = run.model, 2 if run.mixed else 4
    cache = width * run.rows * run.tokens * 2 * model.keys
    return {
        "gathered policy": float(width * model.policy if run.sharded else 0),
        "cache": float(cache * (model.layers + 1)),
        "choice": 12.0 * run.rows * model.vocabulary,
    }


def peak_bytes(run: Run) -> dict[str, float]:
    """Peak of one device and its parts.

    States are held throughout: gradients are there during sampling too, and beside the activations
    from the second micro-batch of a step on. On top comes the larger of sampling and update. In the
    update of sharded weights one layer is gathered, in the type of the products, three times
    (forward, prefetched, gradient).
    """
    states, sampling = state_bytes(run), sampling_bytes(run)
    layer = max(run.model.layer_weights, run.model.table)
    update = {
        "activations": activation_bytes(run),
        "logits": logits_bytes(run),
        "gathered layers": 3.0 * (2 if run.mixed else 4) * layer if run.sharded else 0.0,
    }
    extra = max(sum(sampling.values()), sum(update.values()))
    return {**states, **sampling, **update, "peak": sum(states.values()) + extra}


# ----- time, floating-point operations


def attention_flops(model: Model, queries: float, context: float) -> float:
    """Scores and weighted values of all layers."""
    return 4.0 * model.layers * model.attention * queries * context


def sampling_flops(run: Run, responses: int, prompts: int) -> float:
    """2 a parameter and token; a prompt is read once for all its responses."""
    model = run.model
    read = prompts * 2.0 * (run.prompt_tokens * model.trunk + model.table)
    steps = responses * (run.new_tokens - 1)
    written = steps * 2.0 * (model.trunk + model.table)
    context = run.prompt_tokens + run.new_tokens / 2
    return read + written + attention_flops(model, steps, context)


def forward_flops(run: Run, responses: int, head: bool = True) -> float:
    """One forward pass over prompts and responses; the head on the responses only.

    torch's attention computes the masked half too where it is given a mask, so it is counted whole.
    """
    model = run.model
    trunk = 2.0 * run.tokens * model.trunk + attention_flops(model, run.tokens, run.tokens)
    return responses * (trunk + (2.0 * run.new_tokens * model.table if head else 0.0))


def evaluation_flops(run: Run, responses: int) -> float:
    """Policy and, if there is one, critic; no reference."""
    critic = forward_flops(run, responses, head=False) if run.critic == "separate" else 0.0
    return forward_flops(run, responses) + critic


def update_flops(run: Run, responses: int) -> float:
    """Forward and twice that backward, once more forward with checkpointing.

    Frozen matrices have no gradient of their own: backward is once. The head is never computed
    twice.
    """
    trunk = forward_flops(run, responses, head=False)
    head = forward_flops(run, responses) - trunk
    frozen = run.lora_rank > 0
    passes = (2.0 if frozen else 3.0) + (1.0 if run.checkpointing else 0.0)
    models = 2 if run.critic == "separate" else 1
    return models * passes * trunk + (2.0 if frozen else 3.0) * head


@dataclass(frozen=True)
class Device:
    """An accelerator, and what share of its peaks is assumed to be reached."""

    flops: float = 989e12  # H100 SXM, dense bfloat16
    bandwidth: float = 3.35e12  # bytes a second
    compute_fraction: float = 0.4  # MFU of evaluation and update
    bandwidth_fraction: float = 0.6  # of sampling, which reads weights and cache once a token


def device_seconds(run: Run, responses: int, prompts: int, device: Device) -> dict[str, float]:
    """Seconds of an iteration's phases on ``run.devices``, communication not counted.

    Sampling takes the longer of arithmetic and reading: every step reads the weights, from the
    device's own memory, and the cache of its rows, ``run.rows`` at a time.
    """
    model, width = run.model, 2
    speed = device.flops * device.compute_fraction
    own = responses / run.devices
    turns = max(1.0, own / run.rows)
    weights = width * (model.trunk + model.table)
    context = run.prompt_tokens + run.new_tokens / 2
    cache = width * min(run.rows, own) * context * 2 * model.keys * model.layers
    reading = turns * run.new_tokens * (weights + cache)
    share = prompts / run.devices
    return {
        "sampling": max(
            sampling_flops(run, 1, 0) * own / speed
            + (sampling_flops(run, 1, 1) - sampling_flops(run, 1, 0)) * share / speed,
            reading / (device.bandwidth * device.bandwidth_fraction),
        ),
        "evaluation": evaluation_flops(run, 1) * own / speed,
        "update": update_flops(run, 1) * own / speed,
    }


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

QWEN = {  # the published configurations
    "1.5B": Model(28, 1536, 8960, 12, 2, 151936, tied=True),
    "7B": Model(28, 3584, 18944, 28, 4, 152064),
    "70B (72B)": Model(80, 8192, 29568, 64, 8, 152064),
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
