"""``fit --dry_run``: one iteration of two prompts, and what the whole run would take by it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jsonargparse import Namespace
from transformers import PreTrainedConfig

from tre_lightning.common.memory import peak_memory
from tre_lightning.training.memory_model import GIB, Model, device_count, peak_bytes, run_of, shown

PROMPTS = 2


def shorten(options: Namespace) -> dict[str, Any]:
    """Make a trial run of the options of ``fit``; gives what they were.

    It has more prompts than two only where devices and minibatches need them.
    """
    whole: dict[str, Any] = options.as_dict()
    ppo, trainer, data = options.model.ppo, options.trainer, options.data.init_args
    devices = device_count(trainer)
    parts = ppo.num_minibatches * devices
    needed = math.ceil(parts / options.model.rollout.num_responses)
    if ppo.minibatches_by == "prompt":
        needed = max(needed, ppo.num_minibatches)
    prompts = min(max(PROMPTS, devices, needed), data.batch_size)
    trainer.fast_dev_run = 1
    data.batch_size = data.eval_batch_size = prompts
    return whole


def report(
    whole: Mapping[str, Any],
    tried: Mapping[str, Any],
    config: PreTrainedConfig,
    seconds: float,
    device: torch.device,
) -> Iterator[str]:
    """Lines of measured against estimated memory, and of the time of the whole run.

    Args:
        whole: the options as they were given.
        tried: those of the trial run.
        config: of the policy.
        seconds: of the iteration.
        device: where it ran.
    """
    prompts = int(tried["data"]["init_args"]["batch_size"])
    yield f"dry run      one iteration of {prompts} prompts; nothing was kept"
    if device.type == "cuda":
        measured = f"{torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB measured"
    else:
        measured = f"{peak_memory() / GIB:.1f} GiB measured, libraries included"
    shape = shape_of(config)
    if shape is None:
        yield f"memory       {measured}; there is no estimate for a {config.model_type}"
    else:
        small, large = run_of(tried, shape), run_of(whole, shape)
        estimated = peak_bytes(small)["peak"] / GIB
        yield f"memory       {measured}; {estimated:.1f} GiB estimated for these prompts"
        yield f"whole run    {shown(large)} GiB a device, estimated"
    times = math.ceil(whole["data"]["init_args"]["batch_size"] / prompts)
    each = f"at most about {times * seconds:.0f} s an iteration"
    iterations = _iterations(whole)
    if math.isinf(iterations):
        yield f"time         {each}, without end"
    else:
        hours = iterations * times * seconds / 3600
        yield f"time         {each}, {hours:.1f} hours for {iterations:.0f}, without validation"


def shape_of(config: PreTrainedConfig) -> Model | None:
    """The shape of a model, None for one of another kind than Llama and Qwen."""
    text: Any = config.get_text_config()
    if not isinstance(getattr(text, "intermediate_size", None), int):
        return None
    return Model(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        vocabulary=text.vocab_size,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        normed_heads=text.model_type.startswith("qwen3"),
    )


def _iterations(config: Mapping[str, Any]) -> float:
    """Of the whole run; infinite without a limit."""
    trainer, ppo = config["trainer"], config["model"]["ppo"]
    epochs, steps = trainer["max_epochs"], trainer["max_steps"]
    limits = [math.inf]
    if epochs is not None and epochs >= 0:
        limits.append(epochs * config["data"]["init_args"]["iterations_per_epoch"])
    if steps is not None and steps >= 0:
        limits.append(math.ceil(steps / (ppo["num_epochs"] * ppo["num_minibatches"])))
    return min(limits)
