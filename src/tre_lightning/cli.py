"""The command line: ``python -m tre_lightning {fit,validate,test,predict} --config FILE``.

A leading ``sft`` trains on demonstrations instead: ``python -m tre_lightning sft fit ...``.
"""

import copy
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from tre_lightning.callbacks.checkpoint import (
    IterationCheckpoint,
    find_checkpoint,
    folder,
    refuse_other_model,
    saved_run,
)
from tre_lightning.callbacks.loss_term import find_loss_terms
from tre_lightning.callbacks.progress import RunProgress
from tre_lightning.callbacks.summary import PredictionWriter, RunSummary
from tre_lightning.data.demonstrations import Demonstrations
from tre_lightning.data.prompts import PromptDataModule
from tre_lightning.memory import keep_freed_memory
from tre_lightning.policy import ActorCritic, PolicyArgs, load_tokenizer, parameter_shapes
from tre_lightning.ppo import PPOModule
from tre_lightning.sft import SFTModule
from tre_lightning.tokenizer import word_tokenizer
from tre_lightning.warm_start import WarmStart, wait_for

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)

Loaded = TypeVar("Loaded")

_LONGEST_MESSAGE = 500  # characters
# Lines with which jsonargparse describes the other types that a value could have had.
_NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value type:",
    "Given value: Namespace(",
    "Given value: NestedArg(",
    "Given value: [",
    "Given value: {",
    "Subclass types expect",
    "a class path",
    "a dict ",
    "Not a valid subclass",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Expected a dot import path",
)


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Run a command; ``args`` defaults to the process's arguments.

    Returns:
        The command line object, with ``trainer``, ``model`` and ``datamodule``.

    Raises:
        SystemExit: with code 2 and one line on stderr for a configuration that cannot work.
    """
    keep_freed_memory()
    _be_quiet()
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] == ["sft"]:
        return SFTCLI(words[1:], SFTModule, Demonstrations)
    return PPOCLI(words, PPOModule, PromptDataModule)


def run() -> None:
    """Console entry point; exits with 143 where SIGTERM stopped the run."""
    try:
        stopped = main().trainer.received_sigterm
    except SIGTERMException:
        stopped = True
    if stopped:
        sys.exit(143)


class RunConfig(SaveConfigCallback):
    """Writes the configuration of ``fit`` into the run directory, ready to be used again."""

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, given: Namespace
    ) -> None:
        """``given`` is the configuration before any path was filled in."""
        super().__init__(parser, given, overwrite=True)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Only ``fit`` owns the run directory."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


def _be_quiet() -> None:
    """Silence what says nothing of this run: tips, progress of small files, a known deprecation."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


def _seed(seed: bool | int) -> int:
    """What Lightning makes of ``seed_everything``: true and false mean 0 here."""
    return 0 if isinstance(seed, bool) else seed


@contextmanager
def one_line_errors(hint: str = "") -> Iterator[None]:
    """Turn an error of the configuration into one line and exit code 2.

    TRE_DEBUG=1 shows the traceback instead.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("TRE_DEBUG"):
            raise
        print(f"error: {one_line(str(error))}{hint}", file=sys.stderr)
        raise SystemExit(2) from error


def one_line(message: str) -> str:
    """What matters of an error message of many lines, on one."""
    lines = [" ".join(line.split()).removeprefix("- ") for line in message.splitlines()]
    telling = [line for line in lines if line and not line.startswith(_NOISE)]
    joined = ""
    for line in telling or lines:
        joined += (" " if joined.endswith((":", ".", ",")) else "; ") + line if joined else line
    joined = re.sub(r"<class '([\w.]+)'>", r"\1", joined)
    short = len(joined) <= _LONGEST_MESSAGE
    return joined if short else joined[:_LONGEST_MESSAGE] + " ..."


def read(field: str, name: str, load: Callable[[str], Loaded]) -> Loaded:
    """Load what ``field`` names, from a directory or the hub.

    Raises:
        ValueError: if that does not work, whatever the reason.
    """
    try:
        return load(name)
    except Exception as error:
        raise ValueError(
            f"{field}={name} could not be loaded; give a model directory, or a hub name that can "
            f"be reached from here ({type(error).__name__}: {str(error).strip()[:200]})"
        ) from error


def expected_shapes(policy: PolicyArgs, config: PreTrainedConfig) -> dict[str, list[int]]:
    """Shape of every parameter that a run on ``policy`` has, without loading or building it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        critic = None
        if policy.critic_model is not None:
            critic = AutoModel.from_config(AutoConfig.from_pretrained(policy.critic_model))
        elif policy.critic == "separate":
            critic = copy.deepcopy(model.base_model)
        return parameter_shapes(ActorCritic(model, critic))


class _CLI(LightningCLI):
    """LightningCLI with one-line errors, and paths that all derive from the run directory."""

    progress_name = "ppo"
    resumed_iteration: int | None = None

    def __init__(
        self,
        args: Sequence[str] | Mapping[str, Any],
        model: type[LightningModule],
        data: type[LightningDataModule],
    ) -> None:
        """Parse, build and run the command in ``args``."""
        parser = {"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            model,
            data,
            args=cast(Any, args),
            subclass_mode_data=True,
            seed_everything_default=42,
            save_config_callback=RunConfig,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={**parser, **{name: dict(parser) for name in self.subcommands()}},
            trainer_defaults={
                "default_root_dir": "runs/default",
                "enable_model_summary": False,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every command has."""
        parser.add_lightning_class_args(RunProgress, "progress")
        parser.set_defaults({"progress.name": self.progress_name})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; unlike Lightning, do not warn about ``args`` beside the process's own."""
        parse = parser.parse_object if isinstance(args, Mapping) else parser.parse_args
        with one_line_errors("; --help lists every option and its type"):
            self.config = parse(args)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's options override the given ones."""

    def before_instantiate_classes(self) -> None:
        """Fill in the paths."""
        self.options: Namespace = self.config[self.subcommand]
        given = self.options.clone()
        if "ckpt_path" in given:
            given.ckpt_path = None
        self.save_config_kwargs = {"given": given}
        with one_line_errors():
            self.fill_in_paths()

    def fill_in_paths(self) -> None:
        """Log into the run directory, unless another logger is configured.

        Other commands than fit log into a folder of their own: their scores are no point of the
        run's curves.
        """
        if self.options.trainer.logger in (None, True):
            fits = self.subcommand == "fit"
            save_dir = self.run_dir if fits else str(Path(self.run_dir) / str(self.subcommand))
            first_step = self.resumed_iteration if fits else None
            logger = {"save_dir": save_dir, "purge_step": first_step or 0}
            spec = {"class_path": "tre_lightning.loggers.TensorBoard", "init_args": logger}
            self.options.trainer.logger = Namespace(spec)  # type: ignore[no-untyped-call]

    def instantiate_classes(self) -> None:
        """Build module, data and trainer; their checks run here, before any work."""
        with one_line_errors():
            super().instantiate_classes()

    @property
    def run_dir(self) -> str:
        """Directory of everything that this run writes."""
        return str(self.options.trainer.default_root_dir)


class SFTCLI(_CLI):
    """Supervised training on a task's demonstrations."""

    progress_name = "warm start"

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only ``fit``."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def fill_in_paths(self) -> None:
        """Protect an earlier model."""
        super().fill_in_paths()
        if Path(self.options.model.output_dir).exists():
            raise ValueError(
                f"model.output_dir={self.options.model.output_dir} already exists; give another "
                "directory or delete this one"
            )


class PPOCLI(_CLI):
    """PPO with a warm start where one is asked for."""

    warm_start_seconds: float | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add checkpoints, summary, warm start and the values that must match."""
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(IterationCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RunSummary, "summary")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_argument(
            "--warm_start",
            type=WarmStart | None,
            default=None,
            help="train on the task's demonstrations first, once, and keep the result",
        )
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_seed)
        parser.link_arguments(
            ("model.policy.tokenizer", "model.policy.model"),
            "data.init_args.tokenizer",
            compute_fn=lambda tokenizer, model: tokenizer or model,
        )

    def fill_in_paths(self) -> None:
        """Find the checkpoint, protect an earlier run, and name the warm start's directory."""
        if self.options.ckpt_path:
            path = find_checkpoint(str(self.options.ckpt_path), self.run_dir)
            self.resumed_run = saved_run(path)
            self.resumed_iteration = int(self.resumed_run["iteration"])
            self.options.ckpt_path = str(path)
        elif self.subcommand == "fit" and (folder(self.run_dir) / "last.ckpt").exists():
            raise ValueError(
                f"trainer.default_root_dir={self.run_dir} already holds a run; continue it with "
                "--ckpt_path last, or give another directory, or delete this one"
            )
        super().fill_in_paths()
        self.warm_start: WarmStart | None = None
        if self.options.warm_start is not None:
            self._name_warm_start(WarmStart(**self.options.warm_start.as_dict()))

    def _name_warm_start(self, warm_start: WarmStart) -> None:
        options = self.options
        policy = options.model.policy.as_dict()
        data = {
            "class_path": options.data.class_path,
            "init_args": options.data.init_args.as_dict(),
        }
        data["init_args"].pop("tokenizer", None)
        seed = options.model.seed
        directory = warm_start.directory(policy, data, seed)
        self.warm_start = warm_start
        self.warm_start_dir = directory
        self.warm_start_config = warm_start.config(directory, policy, data, seed)
        self.warm_start_config["trainer"]["accelerator"] = options.trainer.accelerator
        model = str(directory / "model")
        policy_options = options.model.policy
        policy_options.model, policy_options.architecture = model, None
        policy_options.tokenizer = None
        options.data.init_args.tokenizer = model

    # ----- before and after the trainer

    def prepare(self) -> None:
        """Check data against model, then run the warm start where its result is not there yet."""
        module, data = self.model, self.datamodule
        assert isinstance(module, PPOModule) and isinstance(data, PromptDataModule)
        with one_line_errors():
            self._check(module, data)
        if self.warm_start is None or (self.warm_start_dir / "model").exists():
            return
        if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) > 0:
            wait_for(self.warm_start_dir / "model")
            return
        started = time.perf_counter()
        options = {"subcommand": "fit", "fit": self.warm_start_config}
        SFTCLI(options, SFTModule, Demonstrations)
        self.warm_start_seconds = time.perf_counter() - started

    def _check(self, module: PPOModule, data: PromptDataModule) -> None:
        find_loss_terms(self.trainer.callbacks)  # type: ignore[attr-defined]
        self._check_batches(module, data)
        policy = module.policy_args
        if self.warm_start is not None and not Path(policy.model or "").exists():
            policy = PolicyArgs(**self.warm_start_config["model"]["policy"])
        config = self._model_config(policy)
        named = policy.tokenizer_source
        if named is None and self.warm_start is None:
            raise ValueError(
                "model.policy.architecture alone has no tokenizer; give model.policy.tokenizer "
                "or a warm_start"
            )
        data.check(
            word_tokenizer(data.vocabulary(), config)
            if named is None
            else read("model.policy.tokenizer", named, load_tokenizer)
        )
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        needed = data.longest_prompt + module.rollout_args.max_new_tokens
        if context is not None and needed > context:
            raise ValueError(
                f"model.rollout.max_new_tokens={module.rollout_args.max_new_tokens} and the "
                f"longest prompt of {data.longest_prompt} tokens exceed the model's context of "
                f"{context} tokens; lower it or drop long prompts"
            )
        if self.resumed_iteration is not None:
            refuse_other_model(expected_shapes(policy, config), self.resumed_run["shapes"])

    @staticmethod
    def _model_config(policy: PolicyArgs) -> PreTrainedConfig:
        if (policy.model is None) == (policy.architecture is None):
            raise ValueError(
                "give exactly one of model.policy.model (a directory or hub name) and "
                f"model.policy.architecture, not model={policy.model}, "
                f"architecture={policy.architecture}"
            )
        if policy.critic_model is not None:
            read("model.policy.critic_model", policy.critic_model, AutoConfig.from_pretrained)
        if policy.architecture is None:
            config = read("model.policy.model", str(policy.model), AutoConfig.from_pretrained)
        else:
            architecture = dict(policy.architecture)
            config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
        return cast(PreTrainedConfig, config)

    def _check_batches(self, module: PPOModule, data: PromptDataModule) -> None:
        devices = self.trainer.world_size
        if data.batch_size < devices:
            raise ValueError(
                f"data.batch_size={data.batch_size} must be at least one prompt for each of the "
                f"{devices} devices"
            )
        minibatches, responses = module.ppo_args.num_minibatches, module.rollout_args.num_responses
        if data.batch_size * responses < minibatches * devices:
            raise ValueError(
                f"model.ppo.num_minibatches={minibatches} is too many for data.batch_size="
                f"{data.batch_size} x model.rollout.num_responses={responses} responses on "
                f"{devices} device(s): every minibatch needs one for each; lower it"
            )

    def before_fit(self) -> None:
        """Warm start, and the scores before training."""
        self.prepare()
        fast = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.resumed_iteration is None and not fast:
            self.trainer.validate(self.model, self.datamodule, verbose=False)
            if self.trainer.received_sigterm:  # fit would forget it
                raise SIGTERMException
            checkpoint = cast(IterationCheckpoint, self.config_init[self.subcommand].checkpoint)
            with one_line_errors():
                checkpoint.check_monitor(self.trainer)

    def after_fit(self) -> None:
        """Print the table."""
        summary = cast(RunSummary, self.config_init[self.subcommand].summary)
        if self.trainer.is_global_zero and summary.after:
            summary.print_table(self.trainer, self.warm_start_seconds)

    before_validate = before_test = before_predict = prepare
