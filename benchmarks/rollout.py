"""Tokens a second of the rollout engines beside transformers' plain ``generate``, in one run.

    python benchmarks/rollout.py --out runs/rollout             # about a minute on 2 CPU cores
    python benchmarks/rollout.py --out runs/rollout --quick     # small, some seconds

Prints a table; writes ``rollout.json``. The samplers take turns within a repetition and the table
shows medians, so that a slow minute hits all of them. All get the same random model, prompts,
number of new tokens and end-of-sequence tokens: a share of the vocabulary, so that the lengths of
responses vary a lot. Only tokens up to the end of each response are counted.

* greedy: one response a prompt; the benchmark fails unless all samplers give the same tokens.
* sampling: several responses a prompt, at temperature 1. Continuous batching draws other numbers.
  In float32 about one row in a hundred differs between ours and ours in parts: rounding depends on
  the size of a batch.
* one step: CPU time of decoding one token of 16 rows behind so many others, with transformers'
  cache, which copies all keys and values at every token, and with ours.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from tre_lightning.batches import PromptBatch
from tre_lightning.common.seeding import generator
from tre_lightning.policy.kv_cache import growing_cache
from tre_lightning.sampling import ContinuousBatching, InProcess, RolloutEngine, Sampling

PAD = 0
GREEDY = 1e-8  # temperature at which sampling takes the most probable token
Fields = dict[str, Any]
Sampler = Callable[[PromptBatch, int, float], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is sampled."""

    rows: int = 256  # responses
    num_responses: int = 8  # a prompt, when sampling
    max_new_tokens: int = 64
    prompt_lengths: tuple[int, int] = (8, 32)  # tokens, uniformly distributed
    end_fraction: float = 1 / 16  # of the vocabulary that ends a response
    vocabulary: int = 8192
    hidden: int = 256
    layers: int = 4


def make_model(setting: Setting) -> PreTrainedModel:
    """A random Qwen3, initialised so widely that greedy responses do not soon repeat themselves."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=3 * setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=setting.hidden // 4,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    return model


def make_prompts(setting: Setting, count: int) -> PromptBatch:
    """Random prompts, padded on the left."""
    numbers = generator("prompts")
    shortest, longest = setting.prompt_lengths
    lengths = torch.randint(shortest, longest + 1, (count, 1), generator=numbers)
    mask = torch.arange(longest) >= longest - lengths
    ids = torch.randint(1, setting.vocabulary, mask.shape, generator=numbers) * mask
    return PromptBatch(ids, mask, ("",) * count, ({},) * count, "train", 0, 0, count)


def samplers(model: Any, setting: Setting) -> tuple[dict[str, Sampler], Tensor]:
    """Each maps prompts, responses a prompt and temperature to responses ``[B, T]``; end tokens."""
    count = round(setting.end_fraction * setting.vocabulary)
    ends = torch.randperm(setting.vocabulary - 1, generator=generator("ends"))[:count] + 1
    eos = ends.tolist()

    def of(engine: RolloutEngine, size: int | None = None) -> Sampler:
        def sample(prompts: PromptBatch, num_responses: int, temperature: float) -> Tensor:
            how = Sampling(
                num_responses=num_responses,
                max_new_tokens=setting.max_new_tokens,
                eos_token_ids=eos,
                pad_token_id=PAD,
                seed=0,
                temperature=temperature,
                sample_batch_size=size,
            )
            return engine.sample(model, prompts, how).response_ids

        return sample

    def plain(prompts: PromptBatch, num_responses: int, temperature: float) -> Tensor:
        how: Fields = {"do_sample": False}
        if temperature != GREEDY:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        ids: Tensor = model.generate(
            input_ids=prompts.prompt_ids,
            attention_mask=prompts.prompt_mask.long(),
            num_return_sequences=num_responses,
            max_new_tokens=setting.max_new_tokens,
            eos_token_id=eos,
            pad_token_id=PAD,
            **how,
        )
        return ids[:, prompts.prompt_ids.shape[1] :]

    named = {
        "transformers generate": plain,
        "ours": of(InProcess()),
        f"ours, {setting.rows // 4} at a time": of(InProcess(), setting.rows // 4),
        "continuous batching": of(ContinuousBatching()),
        f"continuous batching, {setting.rows // 4} at a time": of(
            ContinuousBatching(), setting.rows // 4
        ),
    }
    return named, ends


def lengths(responses: Tensor, ends: Tensor) -> Tensor:
    """Tokens of each response, its end included, ``[B, T] -> [B]``."""
    is_end = torch.isin(responses, ends)
    before = is_end.cumsum(1) - is_end.long()
    return (before == 0).sum(1)


def measure(
    named: dict[str, Sampler],
    ends: Tensor,
    prompts: PromptBatch,
    num_responses: int,
    temperature: float,
    repetitions: int,
) -> list[Fields]:
    """Tokens a second of each sampler; they take turns.

    Raises:
        RuntimeError: if greedy responses differ.
    """
    seconds: dict[str, list[float]] = {name: [] for name in named}
    rates: dict[str, list[float]] = {name: [] for name in named}
    found: dict[str, Tensor] = {}
    for _ in range(repetitions):
        for name, sample in named.items():
            started = time.perf_counter()
            found[name] = sample(prompts, num_responses, temperature)
            seconds[name].append(time.perf_counter() - started)
            rates[name].append(int(lengths(found[name], ends).sum()) / seconds[name][-1])
    for name, responses in found.items():
        if temperature == GREEDY and not torch.equal(responses, found["ours"]):
            raise RuntimeError(f"{name} and ours give different greedy responses")
    rate = {name: statistics.median(measured) for name, measured in rates.items()}
    rows = []
    for name in named:
        spread = lengths(found[name], ends).double()
        fields = {
            "mode": "greedy" if temperature == GREEDY else "sampling",
            "sampler": name,
            "prompts": len(prompts),
            "responses": len(spread),
            "tokens": int(spread.sum()),
            "length 10/50/90 %": spread.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist(),
            "seconds": statistics.median(seconds[name]),
            "tokens/s": rate[name],
            "of generate": rate[name] / rate["transformers generate"],
        }
        rows.append(fields)
    return rows


@torch.no_grad()
def one_step(model: Any, setting: Setting, length: int, repetitions: int = 12) -> Fields:
    """Median CPU time in ms of a decoding step behind ``length`` tokens, with each cache."""
    rows = 16
    prompt = torch.randint(1, setting.vocabulary, (1, length), generator=generator("step"))
    token = torch.arange(1, rows + 1).unsqueeze(1)
    fields: Fields = {"rows": rows, "length": length}
    caches = {"copying": DynamicCache(config=model.config), "ours": growing_cache(model.config)}
    for name, cache in caches.items():
        model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
        cache.reorder_cache(torch.zeros(rows, dtype=torch.int64))  # type: ignore[arg-type]
        spent = []
        for _ in range(repetitions):
            started = time.process_time()
            model(input_ids=token, past_key_values=cache)
            spent.append(1e3 * (time.process_time() - started))
        fields[f"{name}, ms"] = statistics.median(spent)
    return fields


def report(results: Fields, console: Console) -> None:
    """The table."""
    head = results["machine"]
    console.print(f"{head['cpu']}, {head['threads']} threads, torch {head['torch']}")
    titles = {
        "rows": f"{results['setting']}, median of {results['repetitions']}",
        "steps": "one step, CPU time",
    }
    for key, title in titles.items():
        table = Table(title=title)
        for column in results[key][0]:
            table.add_column(column, justify="right")
        for row in results[key]:
            table.add_row(*(cell(value) for value in row.values()))
        console.print(table)


def cell(value: Any) -> str:
    """A number or a list of lengths."""
    if isinstance(value, list):
        return "/".join(f"{length:.0f}" for length in value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def machine() -> Fields:
    """What it ran on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Run both modes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/rollout"), help="a directory")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few responses only")
    options = parser.parse_args()
    setting = Setting(rows=32, max_new_tokens=16) if options.quick else Setting()
    model = make_model(setting)
    named, ends = samplers(model, setting)
    rows = []
    for num_responses, temperature in ((1, GREEDY), (setting.num_responses, 1.0)):
        prompts = make_prompts(setting, setting.rows // num_responses)
        rows += measure(named, ends, prompts, num_responses, temperature, options.repetitions)
    lengths_of_steps = (64, 512) if options.quick else (64, 512, 2048)
    results = {
        "machine": machine(),
        "setting": vars(setting),
        "repetitions": options.repetitions,
        "rows": rows,
        "steps": [one_step(model, setting, length) for length in lengths_of_steps],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rollout.json").write_text(json.dumps(results, indent=1) + "\n")
    report(results, Console(width=200))


if __name__ == "__main__":
    main()
