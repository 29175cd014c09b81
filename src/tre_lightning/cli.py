"""The command line: ``python -m tre_lightning {fit,validate,test,predict} --config FILE``.

A leading ``sft`` trains on demonstrations instead: ``python -m tre_lightning sft fit ...``.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.environments import LightningEnvironment
from transformers import AutoConfig

from tre_lightning.callbacks.checkpoint import (
    IterationCheckpoint,
    find_checkpoint,
    folder,
    saved_iteration,
)
from tre_lightning.callbacks.progress import RunProgress
from tre_lightning.callbacks.summary import PredictionWriter, RunSummary
from tre_lightning.data.demonstrations import Demonstrations
from tre_lightning.data.prompts import PromptDataModule
from tre_lightning.memory import keep_freed_memory
from tre_lightning.policy import load_tokenizer
from tre_lightning.ppo import PPOModule
from tre_lightning.sft import SFTModule
from tre_lightning.tokenizer import word_tokenizer
from tre_lightning.warm_start import WarmStart, wait_for

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Run a command; ``args`` defaults to the process's arguments.

    Returns:
        The command line object, with ``trainer``, ``model`` and ``datamodule``.

    Raises:
        SystemExit: with code 2 and one line on stderr for a configuration that cannot work.
    """
    keep_freed_memory()
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] == ["sft"]:
        return SFTCLI(words[1:], SFTModule, Demonstrations)
    return PPOCLI(words, PPOModule, PromptDataModule)


def run() -> None:
    """Console entry point."""
    cli = main()
    if cli.trainer.received_sigterm:
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


def _seed(seed: bool | int) -> int:
    """What Lightning makes of ``seed_everything``: true and false mean 0 here."""
    return 0 if isinstance(seed, bool) else seed


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error of the configuration into one line and exit code 2.

    TRE_DEBUG=1 shows the traceback instead.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("TRE_DEBUG"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


class _CLI(LightningCLI):
    """LightningCLI with one-line errors, and paths that all derive from the run directory."""

    progress_name = "ppo"

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
            args=args,
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
        with one_line_errors():
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
        """Log into the run directory, unless another logger is configured."""
        if self.options.trainer.logger in (None, True):
            logger = {"save_dir": self.run_dir, "purge_step": self.purge_step}
            spec = {"class_path": "tre_lightning.loggers.TensorBoard", "init_args": logger}
            self.options.trainer.logger = Namespace(spec)

    def instantiate_classes(self) -> None:
        """Build module, data and trainer; their checks run here, before any work."""
        with one_line_errors():
            super().instantiate_classes()

    @property
    def run_dir(self) -> str:
        """Directory of everything that this run writes."""
        return str(self.options.trainer.default_root_dir)

    @property
    def purge_step(self) -> int | None:
        """Step from which on earlier logs in the run directory are void."""
        return 0 if self.subcommand == "fit" else None


class SFTCLI(_CLI):
    """Supervised training on a task's demonstrations."""

    progress_name = "warm start"

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only ``fit``."""
        return {"fit": LightningCLI.subcommands()["fit"]}


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
        self.resumed_iteration: int | None = None
        if self.options.ckpt_path:
            path = find_checkpoint(str(self.options.ckpt_path), self.run_dir)
            self.resumed_iteration = saved_iteration(path)
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
        data = {"class_path": options.data.class_path, "init_args": options.data.init_args.as_dict()}
        data["init_args"].pop("tokenizer", None)
        seed = options.model.seed
        directory = warm_start.directory(policy, data, seed)
        self.warm_start = warm_start
        self.warm_start_dir = directory
        self.warm_start_config = warm_start.config(directory, policy, data, seed)
        model = str(directory / "model")
        options.model.policy.update(Namespace(model=model, architecture=None, tokenizer=None))
        options.data.init_args.tokenizer = model

    @property
    def purge_step(self) -> int | None:
        """The iteration that a resumed run goes on with."""
        return self.resumed_iteration or super().purge_step

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
        policy = module.policy_args
        building = self.warm_start is not None and not Path(policy.model or "").exists()
        source = self.warm_start_config["model"]["policy"] if building else vars(policy)
        if (source["model"] is None) == (source["architecture"] is None):
            raise ValueError(
                "give exactly one of model.policy.model (a directory or hub name) and "
                "model.policy.architecture"
            )
        architecture = dict(source["architecture"] or {})
        config = (
            AutoConfig.for_model(architecture.pop("model_type"), **architecture)
            if architecture
            else AutoConfig.from_pretrained(source["model"])
        )
        named = source["tokenizer"] or source["model"]
        data.check(
            load_tokenizer(named)
            if named
            else word_tokenizer(data.vocabulary(), config.vocab_size)
        )
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        needed = data.longest_prompt + module.rollout_args.max_new_tokens
        if context is not None and needed > context:
            raise ValueError(
                f"model.rollout.max_new_tokens={module.rollout_args.max_new_tokens} and the longest "
                f"prompt of {data.longest_prompt} tokens exceed the model's context of {context} "
                "tokens; lower it or drop long prompts"
            )

    def before_fit(self) -> None:
        """Warm start, and the scores before training."""
        self.prepare()
        if self.resumed_iteration is None and not self.trainer.fast_dev_run:
            self.trainer.validate(self.model, self.datamodule, verbose=False)

    def after_fit(self) -> None:
        """Print the table."""
        summary = cast(RunSummary, self.config_init[self.subcommand].summary)
        if self.trainer.is_global_zero and summary.after:
            summary.print_table(self.trainer, self.warm_start_seconds)

    before_validate = before_test = before_predict = prepare

