"""A comparison as a YAML file, and the trials that it consists of."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from omegaconf import OmegaConf

from tre_lightning.cli.config_files import read_config, with_layers
from tre_lightning.common.paths import expanded

Value = int | float
Fields = dict[str, Any]

# What the comparison itself sets in every trial.
_OWN = ("seed_everything", "trainer.default_root_dir", "trainer.callbacks", "ckpt_path", "config")


@dataclass(frozen=True)
class Method:
    """A method and the values that are tried for one of its options.

    Args:
        config: its configuration file, relative to the comparison's; None = no settings.
        option: an ``init_args`` of the one callback in ``config``, or, with dots, a flag.
        values: what ``option`` is set to, one after the other.
    """

    config: str | None = None
    option: str | None = None
    values: list[Value] = field(default_factory=list)

    @property
    def settings(self) -> list[Value | None]:
        """The values; ``[None]`` for a method without an option."""
        return list(self.values) or [None]


@dataclass(frozen=True)
class Plan:
    """Methods x values x seeds.

    Args:
        configs: configuration files of every trial, relative to this one; no callbacks.
        methods: by name.
        seeds: every method runs with its chosen value: what is reported.
        output: directory of the trials and the report.
        baseline: name of the method that the others are compared with.
        set: flags of every trial, by dotted key.
        sweep_seeds: every method runs with every value; no seed of ``seeds``. They choose the
            value. Not used where no method has more than one.
        choose_by: validation metric at the end whose highest mean chooses the value.
        keep_checkpoints: keep the checkpoints of finished trials too.
    """

    configs: list[str]
    methods: dict[str, Method]
    seeds: list[int]
    output: str
    baseline: str
    set: dict[str, Any] = field(default_factory=dict)
    sweep_seeds: list[int] = field(default_factory=list)
    choose_by: str = "val/pass@1"
    keep_checkpoints: bool = False

    def __post_init__(self) -> None:
        if not self.configs:
            raise ValueError("configs is empty; give the files of the task and the model")
        if not self.choose_by.startswith(("val/", "val_")):
            raise ValueError(f"choose_by={self.choose_by} is no validation metric; give val/...")
        for name, method in self.methods.items():
            _check_method(name, method)
        if self.baseline not in self.methods:
            given = ", ".join(self.methods)
            raise ValueError(f"baseline={self.baseline} is no method; give one of {given}")
        counts = {name: len(m.values) for name, m in self.methods.items() if m.option}
        if len(set_of(counts.values())) > 1:
            raise ValueError(
                f"methods have unequal numbers of values ({_listed(counts)}); give each as many, "
                "so that none is tuned more than another"
            )
        for key in self.set:
            if key.removesuffix("+") in _OWN or key.startswith("trainer.callbacks"):
                raise ValueError(f"set holds {key}, which the comparison sets itself; drop it")
        self._check_seeds()

    def _check_seeds(self) -> None:
        if not self.seeds:
            raise ValueError("seeds is empty; give one or more, such as [11, 12, 13]")
        for name, seeds in (("seeds", self.seeds), ("sweep_seeds", self.sweep_seeds)):
            if len(set_of(seeds)) < len(seeds) or not all(0 <= s < 2**32 for s in seeds):
                raise ValueError(
                    f"{name}={seeds} has a negative, repeated or too large number (2**32 and on); "
                    "drop it"
                )
        if both := sorted(set_of(self.seeds) & set_of(self.sweep_seeds)):
            raise ValueError(
                f"sweep_seeds and seeds share {both}; a value is reported on other seeds than "
                "those that chose it"
            )
        if self.has_choice and not self.sweep_seeds:
            raise ValueError(
                "sweep_seeds is empty, so nothing can choose between the values; give seeds, or "
                "one value for each method"
            )

    @property
    def has_choice(self) -> bool:
        """Whether a method has more than one value."""
        return any(len(method.values) > 1 for method in self.methods.values())

    @property
    def sweep(self) -> list["Trial"]:
        """The trials that choose the values; methods without an option run once a seed."""
        return [
            Trial(name, value, seed)
            for seed in self.sweep_seeds
            for name, method in self.methods.items()
            for value in method.settings
            if self.has_choice
        ]

    def final(self, chosen: Mapping[str, Value | None]) -> list["Trial"]:
        """The trials to report, of the methods whose value has been chosen."""
        return [
            Trial(name, chosen[name], seed)
            for seed in self.seeds
            for name in self.methods
            if name in chosen
        ]


@dataclass(frozen=True)
class Trial:
    """One run of one method."""

    method: str
    value: Value | None
    seed: int

    @property
    def name(self) -> str:
        """Its directory below ``trials``."""
        setting = self.method if self.value is None else f"{self.method}={self.value}"
        return f"{setting}/seed={self.seed}"

    def directory(self, plan: Plan) -> Path:
        """The directory of all its output."""
        return Path(plan.output) / "trials" / self.name


set_of = frozenset  # `set` is a field of Plan


def read_plan(file: str | Path) -> Plan:
    """Read and check a comparison.

    Raises:
        ValueError: if the file or what it names cannot be used.
    """
    if not Path(file).is_file():
        raise ValueError(f"--config {file} does not exist; give the file of a comparison")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--plan", type=Plan)
    parsed = parser.parse_object({"plan": expanded(read_config(str(file)))})
    plan: Plan = parser.instantiate(parsed).plan
    for trial in plan.sweep or plan.final({n: m.settings[0] for n, m in plan.methods.items()}):
        specification(plan, trial, Path(file).parent)
    return plan


def specification(plan: Plan, trial: Trial, folder: Path) -> Fields:
    """Everything that determines a trial's result, with the content of its files.

    Args:
        plan: the comparison.
        trial: one of its trials.
        folder: what the plan's files are relative to.

    Returns:
        ``method``, ``value``, ``seed``, ``configs`` (YAML texts, in order) and ``flags``.

    Raises:
        ValueError: if a file does not exist or does not fit.
    """
    configs = [c for name in plan.configs for c in _contents("configs", folder, name)]
    for config in configs:
        trainer = config.get("trainer") or {}
        if trainer.get("callbacks") or trainer.get("callbacks+"):
            raise ValueError(
                "configs holds trainer.callbacks, but every method brings its own; give files "
                "without a method, such as those of a task and a model"
            )
    method = plan.methods[trial.method]
    field_name = f"methods.{trial.method}.config"
    own = [] if method.config is None else _contents(field_name, folder, method.config)
    flags = [f"--{key}={_word(value)}" for key, value in plan.set.items()]
    if method.option and "." in method.option:
        flags.append(f"--{method.option}={_word(trial.value)}")
    elif method.option:
        _callback(field_name, own)[method.option] = trial.value
    return {
        "method": trial.method,
        "value": trial.value,
        "seed": trial.seed,
        "configs": [OmegaConf.to_yaml(OmegaConf.create(config)) for config in [*configs, *own]],
        "flags": flags,
        "keep_checkpoints": plan.keep_checkpoints,
    }


def _check_method(name: str, method: Method) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"methods.{name} is no name for a directory; use letters, digits and _")
    if (method.option is None) != (not method.values):
        raise ValueError(f"methods.{name} needs both option and values, or neither")
    if len(set_of(method.values)) < len(method.values):
        raise ValueError(f"methods.{name}.values={method.values} repeats a value; drop it")
    if method.option and "." not in method.option and method.config is None:
        raise ValueError(
            f"methods.{name}.option={method.option} belongs to a callback; give the config that "
            "holds it, or a flag with dots"
        )


def _contents(field_name: str, folder: Path, name: str) -> list[Fields]:
    """A configuration file and its layers, in order."""
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{field_name} names {name}, but {file} does not exist")
    found = []
    for word in with_layers([f"--config={file}"]):
        content = read_config(word.removeprefix("--config="))
        if not isinstance(content, dict):
            raise ValueError(f"{field_name} names {name}, which is no configuration of options")
        found.append(content)
    return found


def _callback(field_name: str, contents: Sequence[Fields]) -> Fields:
    """The ``init_args`` of the one callback."""
    callbacks = [
        callback
        for content in contents
        for key in ("callbacks", "callbacks+")
        for callback in (content.get("trainer") or {}).get(key) or []
    ]
    if len(callbacks) != 1:
        raise ValueError(
            f"{field_name} holds {len(callbacks)} callbacks, but option needs one; write the "
            "option with dots if it is a flag"
        )
    found: Fields = callbacks[0].setdefault("init_args", {})
    return found


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
