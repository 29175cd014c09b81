"""The README.md of an exported policy: what it is, how it was trained, how to load it."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import ModelCardData

from tre_lightning.methods import LossTerm, Method
from tre_lightning.ops import Region

_SHOWN_OTHERWISE = {"coef", "top_k", "top_p", "min_p", "name"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


def model_card(
    *,
    base_model: str | None,
    task: str,
    methods: Sequence[str],
    adapters: str | None,
    iterations: int,
    seed: int,
    before: Mapping[str, float],
    after: Mapping[str, float],
    config: str,
) -> str:
    """The model card as Markdown with a YAML header.

    Args:
        base_model: hub name of the model that was trained; none = it has none.
        task: name of the task.
        methods: a description of each loss term; empty = plain PPO.
        adapters: what was trained instead of all weights; none = all.
        iterations: finished PPO iterations.
        seed: of sampling and shuffling.
        before: held-out metrics before training, by name.
        after: the same after it.
        config: the run's configuration as YAML; empty = left out.
    """
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["reinforcement-learning", "ppo", "tre-lightning"],
    )
    facts = [] if base_model is None else [("Base model", base_model)]
    facts += [
        ("Task", task),
        ("Method", f"PPO with {' and '.join(methods)}" if methods else "PPO, no loss term"),
        ("Trained weights", "all" if adapters is None else f"{adapters}, merged"),
        ("PPO iterations", str(iterations)),
        ("Seed", str(seed)),
    ]
    parts = [
        f"---\n{data}\n---",
        "# Policy trained by tre-lightning",
        "\n".join(f"- {name}: {value}" for name, value in facts),
        _scores(before, after),
        "## Use\n\n" + _block("python", _USE),
    ]
    if config:
        parts.append(
            "## Configuration\n\nSave it as `config.yaml` and run it again with "
            "`python -m tre_lightning fit --config config.yaml`.\n\n" + _block("yaml", config)
        )
    return "\n\n".join(part for part in parts if part) + "\n"


_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

directory = "."  # where this file lies
model = AutoModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
"""


def _scores(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    if not after:
        return ""
    lines = ["## Held-out prompts", "", "| metric | before | after |", "| --- | --- | --- |"]
    for tag, value in after.items():
        first = f"{before[tag]:.3f}" if tag in before else ""
        lines.append(f"| {tag} | {first} | {value:.3f} |")
    return "\n".join(lines)


def _block(language: str, text: str) -> str:
    """A fenced block; the fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def hub_name(model: str | None) -> str | None:
    """The name where it is one of the hub, not a directory."""
    if model is None or Path(model).exists() or not _HUB_NAME.fullmatch(model):
        return None
    return model


def describe(method: Method) -> str:
    """Class, coefficient and regions of a method, and what else is not its default."""
    details = [f"coef {method.coef}"] if isinstance(method, LossTerm) else []
    details += [_region(region) for region in method.regions]
    for option, parameter in inspect.signature(type(method)).parameters.items():
        value = getattr(method, option, parameter.default)
        if option not in _SHOWN_OTHERWISE and value != parameter.default:
            details.append(f"{option} {value}")
    name = type(method).__name__
    return f"{name} ({', '.join(details)})" if details else name


def _region(region: Region) -> str:
    given = (f"{name} {value}" for name, value in asdict(region).items() if value is not None)
    return ", ".join(given) or "whole vocabulary"
