"""The command line: ``python -m tre_lightning {fit,validate,test,predict} --config FILE``.

A file may name others that it builds on (:mod:`tre_lightning.cli.config_files`).

A leading ``sft`` trains on demonstrations instead: ``python -m tre_lightning sft fit ...``.

A leading ``reward`` trains a reward model on pairs of responses. ``fit`` alone does so too where
the last ``data.class_path`` that is given, in a file or as a flag, is ``PreferencePairs``: the data
say what is trained.

A leading ``model`` gets a language model to train (:mod:`tre_lightning.cli.model`).
"""

import logging
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers.utils import logging as transformers_logging

from tre_lightning import tasks
from tre_lightning.callbacks.checkpoint import (
    IterationCheckpoint,
    find_checkpoint,
    folder,
    has_run,
    saved_run,
    warn,
)
from tre_lightning.callbacks.inspection import Inspection
from tre_lightning.callbacks.monitors import MonitorCheck, monitors, others_log, refuse_unknown
from tre_lightning.callbacks.progress import RunProgress
from tre_lightning.callbacks.stop import LAUNCHER, GracefulStop
from tre_lightning.callbacks.summary import PredictionWriter, RunSummary
from tre_lightning.cli import model as model_command
from tre_lightning.cli import trainer_options
from tre_lightning.cli.checks import (
    check_devices,
    check_length,
    check_memory,
    check_resumed,
    check_run,
    check_seed,
    warn_of_slow_bfloat16,
)
from tre_lightning.cli.config_files import read_config, with_layers
from tre_lightning.cli.dry_run import report, shorten
from tre_lightning.cli.slurm import Requeue, is_started_anew
from tre_lightning.cli.trainer_options import blame, check_options, check_ppo_callbacks
from tre_lightning.cli.warm_start import WarmStart, wait_for
from tre_lightning.common.distributed import job_id
from tre_lightning.common.errors import Refused, RunError, disk_full, one_line, one_line_errors
from tre_lightning.common.malloc import keep_freed_memory
from tre_lightning.common.paths import changed, check_directory, expanded, is_locked_here, locked
from tre_lightning.common.seeding import settled_seed
from tre_lightning.common.validation import at_least
from tre_lightning.policy.actor_critic import PolicyArgs
from tre_lightning.policy.sharding import check_whole
from tre_lightning.tasks.alignment.pairs import PreferencePairs
from tre_lightning.tasks.alignment.remote import RewardServerError
from tre_lightning.tasks.base import PromptDataModule
from tre_lightning.tasks.demonstrations import Demonstrations
from tre_lightning.training.optim import check_decay, has_end
from tre_lightning.training.ppo import PPOModule
from tre_lightning.training.reward_model import PairMetrics, RewardModelModule
from tre_lightning.training.sft import SFTModule

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
for _task in tasks.__all__:  # the parser knows by its bare name what has been imported
    getattr(tasks, _task)


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Run a command; ``args`` defaults to the process's arguments.

    Returns:
        The command line object, with ``trainer``, ``model`` and ``datamodule``.

    Raises:
        SystemExit: with one line on stderr and code 2 for a configuration that cannot work, code 1
            where the reward server, updates that are not finite, an infinite score or a full disk
            ended the run, 130 for Ctrl-C, 143 for SIGTERM.

    Example:
        >>> cli = main(["fit", "--config=configs/countdown_tiny.yaml", "--trainer.fast_dev_run=1"])
        >>> cli.model.iteration
        1
    """
    keep_freed_memory()
    _be_quiet()
    given = sys.argv[1:] if args is None else list(args)
    with one_line_errors():
        words = with_layers(given)
    if words[:1] == ["sft"]:
        return SFTCLI(words[1:], SFTModule, Demonstrations)
    if words[:1] == ["reward"]:
        return RewardCLI(words[1:], RewardModelModule, PreferencePairs)
    if words[:1] == ["fit"] and _data_class(words[1:]) == PreferencePairs.__name__:
        return RewardCLI(words, RewardModelModule, PreferencePairs)
    return PPOCLI(words, PPOModule, PromptDataModule, command_to_resume(given))


def run() -> None:
    """Console entry point, with the exit codes of :func:`main` for Ctrl-C during imports too."""
    try:
        if sys.argv[1:2] == ["model"]:
            model_command.main(sys.argv[2:])
        elif main().trainer.received_sigterm:
            sys.exit(143)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


class RunConfig(SaveConfigCallback):
    """Writes the configuration of ``fit`` into the run directory, ready to be used again.

    Lightning's would follow the logger, which may lie elsewhere or nowhere.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, given: Namespace
    ) -> None:
        """``given`` is the configuration before any path was filled in."""
        super().__init__(parser, given, overwrite=True, save_to_log_dir=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write only for ``fit``, which owns the run directory."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, on the first rank only."""
        path = Path(trainer.default_root_dir) / self.config_filename
        path.parent.mkdir(parents=True, exist_ok=True)
        # YAML knows no enumerations, which are defaults of some callbacks of Lightning.
        config = changed(self.config.clone(), lambda x: x.value if isinstance(x, Enum) else x)
        options = {"skip_unset": False, "overwrite": True, "multifile": self.multifile}
        try:
            self.parser.save(config, str(path), **options)
        except ValueError as error:
            warn(f"{path} could not be written, the run goes on: {one_line(str(error))}")


def _be_quiet() -> None:
    """Silence noise of libraries: tips, progress of small files, a known deprecation."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # writes its report so
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", message=".*infer the batch indices")  # nothing needs them
    # Policy and critic stay in it; see ActorCritic.train.
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")
    # The metrics that are logged have been synchronised.
    warnings.filterwarnings("ignore", message=".*in distributed setting to accumulate the metric")


def _data_class(words: Sequence[str]) -> str | None:
    """Name of the last data class given; None = none, or a file that the parser will refuse."""
    found = None
    for option, value in _options(words):
        data: Any = value
        if option == "--config":
            try:
                data = read_config(value)["data"]
            except Exception:  # the parser will say what is wrong
                continue
        elif option not in ("--data", "--data.class_path"):
            continue
        name = data.get("class_path") if isinstance(data, Mapping) else data
        if isinstance(name, str):
            found = name.rpartition(".")[2]
    return found


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Option and value, written ``--option=value`` or ``--option value``."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, joined, value = word.partition("=")
        yield option, value if joined else following


def command_to_resume(words: Sequence[str]) -> str:
    """The shell command that resumes the run which these arguments started."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--ckpt_path":
            next(rest, "")
        elif not word.startswith("--ckpt_path="):
            kept.append(word)
    program = "python -m tre_lightning"
    if Path(sys.argv[0]).name == "tre-lightning":
        program = "tre-lightning"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        program = "torchrun ... -m tre_lightning"  # its own options are not known here
    return f"{program} {shlex.join([*kept, '--ckpt_path', 'last'])}"


# What a configuration names by class, and the option that holds it.
_CONFIGURED: dict[type, str] = {
    Callback: "trainer.callbacks",
    Logger: "trainer.logger",
    Profiler: "trainer.profiler",
    Strategy: "trainer.strategy",
}


def _naming(option: str) -> Callable[..., Any]:
    """An instantiator whose errors name the option and the class."""

    def build(kind: type, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return kind(*args, **kwargs)
        except Exception as error:
            ours = kind.__module__.startswith("tre_lightning.")  # names its options itself
            if ours or str(error).startswith(option):
                raise
            raise ValueError(f"{option} {kind.__name__}: {error}") from error

    return build


class _Parser(LightningArgumentParser):
    """Lightning's parser, which names the option in the error of a class that it builds."""

    def instantiate_classes(self, cfg: Namespace, **options: Any) -> Any:
        """Build what the configuration names by class."""
        naming = [(_naming(option), kind, True) for kind, option in _CONFIGURED.items()]
        return self.instantiate(cfg, instantiators=naming, **options)


def _seed(seed: bool | int) -> int:
    """The seed as a number for the parser; true and false are settled later, in one place."""
    return int(seed)


class _CLI(LightningCLI):
    """LightningCLI with one-line errors and one run directory from which all paths derive."""

    progress_name = "ppo"
    rules = trainer_options.PPO
    resumed_iteration: int | None = None

    def __init__(
        self,
        args: Sequence[str] | Mapping[str, Any],
        model: type[LightningModule],
        data: type[LightningDataModule],
        resume_command: str = "",
    ) -> None:
        """Parse, build and run the command in ``args``; ``resume_command`` is for messages."""
        self.resume_command = resume_command
        self._given = args.get("subcommand") if isinstance(args, Mapping) else next(iter(args), "")
        parser = {"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False}
        with ExitStack() as self.held:  # locks, until the command has ended
            super().__init__(
                model,
                data,
                args=cast(Any, args),
                subclass_mode_data=True,
                seed_everything_default=42,
                save_config_callback=RunConfig,
                parser_class=_Parser,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_kwargs={
                    "prog": "python -m tre_lightning",
                    **parser,
                    **{name: dict(parser) for name in self.subcommands()},
                },
                trainer_defaults={
                    "default_root_dir": "runs/default",
                    "enable_model_summary": False,
                    "log_every_n_steps": 1,
                    "num_sanity_val_steps": 0,
                },
            )

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Add options to the one command that is given alone: a command's take half a second."""
        if self._given in self.subcommands() and subcommand != self._given:
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that every command has."""
        parser.add_lightning_class_args(RunProgress, "progress")
        parser.set_defaults({"progress.name": self.progress_name})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; unlike Lightning, do not warn about ``args`` beside the process's own."""
        parse = parser.parse_object if isinstance(args, Mapping) else parser.parse_args
        with one_line_errors("; --help lists every option and its type"):
            self.config = expanded(parse(args))
        with one_line_errors():
            check_seed(self.config[self.config.subcommand].seed_everything)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's options override the given ones."""

    def _set_seed(self) -> None:
        """Do nothing: a resumed run takes the seed of its checkpoint, which is found later."""

    def before_instantiate_classes(self) -> None:
        """Lock the run directory, settle the seed, and fill in the paths."""
        self.options: Namespace = self.config[self.subcommand]
        with one_line_errors():
            self.change_options()
            check_options(self.options.trainer, self.rules)
            at_least("print_prompts", self.options.get("print_prompts", 0), 0)
            check_devices(self.options.trainer.accelerator, self.options.trainer.devices)
            if self.options.trainer.default_root_dir is None:
                raise ValueError("trainer.default_root_dir=null names no directory; give one")
            check_directory("trainer.default_root_dir", self.run_dir)
            if self.subcommand == "fit" and not (self.fast or self.only_prints):
                self.hold(self.run_dir)
            self.find_run()
            self._settle_seed()
            given = self.options.clone()
            if "ckpt_path" in given:
                given.ckpt_path = None
            self.save_config_kwargs = {"given": given}
            self.fill_in_paths()

    def change_options(self) -> None:
        """Change the options before anything is made of them; nothing by default."""

    def hold(self, directory: str, *, beside: bool = False) -> None:
        """Lock a directory against other processes while this command runs."""
        if not is_locked_here(directory):
            self.held.enter_context(locked(directory, beside=beside))

    def find_run(self) -> None:
        """Find the checkpoint that the command resumes from; none by default."""

    @property
    def saved_seed(self) -> int | None:
        """Seed of the run that the command resumes."""
        return None

    def _settle_seed(self) -> None:
        """One number for torch, the samples and the data."""
        options = self.options
        given = options.seed_everything
        seed = settled_seed(given, self.saved_seed, options.trainer.num_nodes)
        options.seed_everything = seed
        data = options.data.get("init_args") or {}
        # A task's demonstrations have a seed option of their own, if not a draw.
        task = (data.get("task") or {}).get("init_args") if isinstance(given, bool) else None
        for owner in (options.model, data, task):
            if owner and "seed" in owner:
                owner["seed"] = seed
        super()._set_seed()

    def fill_in_paths(self) -> None:
        """Log into the run directory, unless another logger is configured.

        Other commands than fit log into a folder of their own: their scores are no point of the
        run's curves.
        """
        trainer, fits = self.options.trainer, self.subcommand == "fit"
        if trainer.logger in (None, True):
            init = Namespace({"save_dir": self.run_dir, "purge_step": 0})  # type: ignore[no-untyped-call]
            spec = {"class_path": "tre_lightning.callbacks.loggers.TensorBoard", "init_args": init}
            trainer.logger = Namespace(spec)  # type: ignore[no-untyped-call]
        loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        for logger in loggers:
            options = logger.get("init_args") if isinstance(logger, Namespace) else None
            if options is None or options.get("save_dir") != self.run_dir:
                continue
            if not fits:
                options.save_dir = str(Path(self.run_dir) / str(self.subcommand))
            elif options.get("purge_step") in (None, 0) and "purge_step" in options:
                options.purge_step = self.resumed_iteration or 0

    def instantiate_classes(self) -> None:
        """Build module, data and trainer; their checks run here, before any work."""
        with one_line_errors():
            super().instantiate_classes()
            if self.subcommand == "fit":
                check_length(self.trainer)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Build the trainer, without those of our callbacks that flags switch off."""
        given = config["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        own = dict(zip(self._parser(self.subcommand).callback_keys, callbacks, strict=True))
        if config["enable_progress_bar"] is False or any(isinstance(c, ProgressBar) for c in given):
            own = {key: c for key, c in own.items() if not isinstance(c, ProgressBar)}
        if self.fast and not any(isinstance(c, Checkpoint) for c in given):
            config["enable_checkpointing"] = False
        if config["enable_checkpointing"] is False:
            saving = Checkpoint | ServerErrorCheckpoint
            own = {key: c for key, c in own.items() if not isinstance(c, saving)}
        self.check_callbacks(given, own)
        try:
            trainer = super()._instantiate_trainer(config, [*own.values(), *self.more_callbacks()])
        except Exception as error:
            raise ValueError(blame(str(error), self.options.trainer)) from error
        return trainer

    def check_callbacks(self, given: Sequence[Callback], own: Mapping[str, Callback]) -> None:
        """Raise ValueError for a callback of ``trainer.callbacks`` that cannot work."""

    def more_callbacks(self) -> list[Callback]:
        """Callbacks that have no options."""
        return []

    @property
    def only_prints(self) -> bool:
        """Whether the command only prints prompts."""
        return bool(self.options.get("print_prompts"))

    @property
    def fast(self) -> bool:
        """Whether this is a trial run (``fast_dev_run``) that keeps nothing."""
        return bool(self.options.trainer.fast_dev_run)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; an expected failure becomes one line and an exit code."""
        if "LOCAL_RANK" not in os.environ:  # else started by that process, or by another launcher
            os.environ[LAUNCHER] = str(os.getpid())
        warn_of_slow_bfloat16(self.trainer)
        requeue = Requeue(self.trainer, wanted=subcommand == "fit")
        try:
            with requeue:
                super()._run_subcommand(subcommand)
        except SIGTERMException as stopped:  # all ranks stop after the same iteration
            number = self.stop_signal
            if requeued := requeue.ended_early or number == requeue.number:
                number = cast(int, requeue.number)
                requeue.submit()
            how = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            self._say_stopped(how, requeued=requeued)
            raise SystemExit(self._common_code(128 + number)) from stopped
        except (KeyboardInterrupt, SystemExit) as stopped:
            # Lightning makes code 1 of a Ctrl-C.
            if isinstance(stopped, SystemExit) and not (
                stopped.code == 1 and isinstance(stopped.__context__, KeyboardInterrupt)
            ):
                raise
            self._say_stopped("Ctrl-C")
            raise SystemExit(130) from stopped
        except Refused:
            with one_line_errors():
                raise
        except MisconfigurationException as error:
            if os.environ.get("TRE_DEBUG"):
                raise
            if code := self._common_code(2):
                message = one_line(blame(str(error), self.options.trainer))
                print(f"error: {message}", file=sys.stderr)
            raise SystemExit(code) from error
        except (RunError, OSError) as error:
            full = disk_full(error)
            if os.environ.get("TRE_DEBUG") or (isinstance(error, OSError) and not full):
                raise
            code = 1
            if isinstance(error, RunError) and error.of_all_ranks:
                code = self._common_code(1)
            if code:
                fix = "; make room on the disk" if full else ""
                saved = subcommand == "fit" and has_run(self.run_dir)
                hint = f"; go on with --ckpt_path last (saved in {self.run_dir})" if saved else ""
                print(f"error: {one_line(str(error))}{fix}{hint}", file=sys.stderr)
            raise SystemExit(code) from error

    def _common_code(self, code: int) -> int:
        """The exit code; where all ranks fail alike, only the first one prints the line.

        At a code of another one Lightning would kill the first.
        """
        return 0 if self.trainer.global_rank else code

    def _say_stopped(self, how: str, *, requeued: bool = False) -> None:
        if self.trainer.global_rank:
            return
        hint = "; the job is queued again and goes on by itself" if requeued else ""
        if not requeued and self.resume_command and self.subcommand == "fit":
            saved = has_run(self.run_dir)
            hint = f"; go on with: {self.resume_command}" if saved else "; nothing was saved yet"
            if not self.trainer.checkpoint_callbacks:
                hint = "; nothing was saved (trainer.enable_checkpointing=false)"
        print(f"stopped by {how}{hint}", file=sys.stderr)

    @property
    def stop_signal(self) -> int:
        """The signal that stopped the run: between two iterations, or SIGTERM anywhere else."""
        stops = (c for c in self.trainer.callbacks if isinstance(c, GracefulStop))  # type: ignore[attr-defined]
        return next((stop.received for stop in stops if stop.received), int(signal.SIGTERM))

    @property
    def run_dir(self) -> str:
        """Directory of everything that this run writes."""
        return str(self.options.trainer.default_root_dir)


class _TrainingCLI(_CLI):
    """Only ``fit``, which writes one model."""

    rules = trainer_options.SUPERVISED
    logged: tuple[str, ...]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only ``fit``."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def instantiate_classes(self) -> None:
        """Refuse strategies that would not synchronise devices, and a schedule without an end."""
        super().instantiate_classes()
        with one_line_errors():
            check_whole(self.trainer)
            given = self.options.model
            check_decay(self.trainer, given.final_lr_fraction, given.get("warmup_fraction", 0.0))
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            if not others_log(callbacks):
                refuse_unknown(monitors(callbacks), self.logged)

    def fill_in_paths(self) -> None:
        """Protect an earlier model, and keep other processes from writing the same one."""
        super().fill_in_paths()
        output = self.options.model.output_dir
        check_directory("model.output_dir", str(Path(output).parent))
        self.hold(output, beside=True)
        if Path(output).exists():
            raise ValueError(
                f"model.output_dir={self.options.model.output_dir} already exists; give another "
                "directory or delete this one"
            )


class SFTCLI(_TrainingCLI):
    """Supervised training on a task's demonstrations."""

    progress_name = "warm start"
    logged = ("sft/loss",)


class RewardCLI(_TrainingCLI):
    """Training of a reward model on pairs of responses."""

    progress_name = "reward model"
    logged = tuple(f"{part}/{name}" for part in ("reward", "val") for name in PairMetrics().means)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed of the data; the result is the model, so checkpoints are off by default."""
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"trainer.enable_checkpointing": False})
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_seed)


def print_prompts(data: PromptDataModule, command: str, count: int) -> None:
    """Print the first prompts that a command takes, as the policy reads them, with their ids.

    Args:
        data: the configured task, checked.
        command: fit takes training prompts, validate and test those that are held out.
        count: how many, of each held-out set.
    """
    sets = {"train": [data.train_prompt(index) for index in range(count)]}
    if command != "fit":
        sets = data.heldout_prompts("val" if command == "validate" else "test")
    for name, prompts in sets.items():
        shown = prompts[:count]
        for number, ids in enumerate(data.prompt_ids(shown), 1):
            print(f"--- prompt {number} of {name}, {len(ids)} tokens")
            print(data.decoded(ids))
            print("--- ids:", *ids)


class ServerErrorCheckpoint(Callback):
    """Saves a checkpoint when the reward server ends the run.

    Such an error comes before the update of an iteration, so the model is that of a whole one; all
    ranks raise it together.
    """

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save, unless the last iteration is saved already."""
        epoch = trainer.fit_loop.epoch_loop
        progress = epoch.batch_progress
        checkpoint = next(c for c in trainer.callbacks if isinstance(c, IterationCheckpoint))  # type: ignore[attr-defined]
        iteration = cast(int, pl_module.iteration)
        if (
            not isinstance(exception, RewardServerError)
            or not trainer.training
            or progress.current.completed == 0  # saved at the end of the epoch before
            or checkpoint.saved == iteration
        ):
            return
        # The state in which Lightning saves at the end of a batch, which it counts a moment later.
        for counts in cast(Any, (progress.total, progress.current)):
            counts.ready = counts.started = counts.processed = counts.completed
            counts.completed -= 1
        progress.is_last_batch = False
        epoch._batches_that_stepped -= 1
        trainer.datamodule.go_back_to(iteration)  # type: ignore[attr-defined]
        checkpoint._save_last(trainer, pl_module)


class PPOCLI(_CLI):
    """PPO, after a supervised warm start (SFT) if one is configured."""

    warm_start_seconds: float | None = None
    whole: dict[str, Any] | None = None  # the options as given, in a dry run
    _trial: AbstractContextManager[Any] = nullcontext()  # the warm start of a fast_dev_run

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command, then delete what a trial run made."""
        with self._trial:
            super()._run_subcommand(subcommand)

    def check_callbacks(self, given: Sequence[Callback], own: Mapping[str, Callback]) -> None:
        """Refuse callbacks that PPO has built in or that would change its updates."""
        check_ppo_callbacks(given, own)

    def more_callbacks(self) -> list[Callback]:
        """The check of the metrics that callbacks monitor."""
        return [MonitorCheck()]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add checkpoints, summary, inspection, warm start and the values that must match."""
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(IterationCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RunSummary, "summary")
        parser.add_lightning_class_args(Inspection, "inspection")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(ServerErrorCheckpoint, "server_error")
        parser.add_lightning_class_args(GracefulStop, "stop")
        parser.add_argument(
            "--warm_start",
            type=WarmStart | None,
            default=None,
            help="supervised training (SFT) on the task's demonstrations first, once, and cached",
        )
        parser.add_argument(
            "--print_prompts",
            type=int,
            default=0,
            help="print so many prompts as the policy reads them, with their token ids, and exit",
        )
        parser.add_argument(
            "--dry_run",
            type=bool,
            default=False,
            help="build everything, run one iteration of two prompts, print measured and estimated "
            "memory and the time of the whole run, and exit",
        )
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_seed)
        parser.link_arguments(
            ("model.policy.tokenizer", "model.policy.model"),
            "data.init_args.tokenizer",
            compute_fn=lambda tokenizer, model: tokenizer or model,
        )

    def change_options(self) -> None:
        """Make a dry run of ``fit``, and refuse a run that does not fit the GPU."""
        if self.options.get("dry_run"):
            if self.subcommand != "fit":
                raise ValueError(f"dry_run=true is of fit, not of {self.subcommand}; leave it out")
            self.whole = shorten(self.options)
        if self.subcommand == "fit":
            check_memory(self.options.as_dict() if self.whole is None else self.whole)

    def find_run(self) -> None:
        """Find the checkpoint to resume from; protect an earlier run."""
        given, fits = self.options.ckpt_path, self.subcommand == "fit"
        fits = fits and not (self.fast or self.only_prints)
        if given and self.fast and self.subcommand == "fit":
            raise ValueError(
                f"ckpt_path={given} cannot go on with trainer.fast_dev_run="
                f"{self.options.trainer.fast_dev_run}, which trains anew; leave one of them out"
            )
        path = find_checkpoint(str(given), self.run_dir) if given else None
        own = path is not None and path.parent.resolve() == folder(self.run_dir).resolve()
        if fits and has_run(self.run_dir) and not own:
            if not self._goes_on_by_itself():
                raise ValueError(
                    f"trainer.default_root_dir={self.run_dir} already holds a run; continue it "
                    "with --ckpt_path last, or give another directory, or delete this one"
                )
            path = find_checkpoint("last", self.run_dir)
        if fits and path is None and (Path(self.run_dir) / "model").exists():
            raise ValueError(
                f"trainer.default_root_dir={self.run_dir} already holds the model of a run without "
                "checkpoints; give another directory, or delete this one"
            )
        if path is not None:
            self.resumed_run = saved_run(path)
            self.resumed_iteration = int(self.resumed_run["iteration"])
            self.options.ckpt_path = str(path)

    def _goes_on_by_itself(self) -> bool:
        """Whether the run in the directory belongs to this SLURM job, requeued."""
        if not is_started_anew():
            return False
        return bool(saved_run(find_checkpoint("last", self.run_dir))["slurm_job"] == job_id())

    @property
    def saved_seed(self) -> int | None:
        """Seed of the run that the command resumes."""
        return None if self.resumed_iteration is None else self.resumed_run["seed"]

    def fill_in_paths(self) -> None:
        """Name the warm start's directory."""
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
        if self.fast and not (directory / "model").exists():  # one step, and not in the cache
            warm_start = replace(warm_start, steps=1)
            self._trial = trial = TemporaryDirectory()
            directory = Path(trial.name)
        if not (directory / "model").exists():
            check_directory("warm_start.cache_dir", warm_start.cache_dir)
        self.warm_start = warm_start
        self.warm_start_dir = directory
        self.warm_start_config = warm_start.config(directory, policy, data, seed)
        for name in ("accelerator", "enable_progress_bar"):
            self.warm_start_config["trainer"][name] = options.trainer[name]
        model = str(directory / "model")
        policy_options = options.model.policy
        policy_options.model, policy_options.architecture = model, None
        policy_options.tokenizer = None
        options.data.init_args.tokenizer = model

    # ----- before and after the trainer

    def prepare(self) -> None:
        """Check data against model, then run the warm start (SFT) if it is not cached."""
        module, data = self.model, self.datamodule
        assert isinstance(module, PPOModule) and isinstance(data, PromptDataModule)
        with one_line_errors():
            if self.subcommand == "fit":
                module.optim_args.check_end(known=has_end(self.trainer))
            policy = module.policy_args
            if self.warm_start is not None and not (self.warm_start_dir / "model").exists():
                policy = PolicyArgs(**self.warm_start_config["model"]["policy"])
            saved = None if self.resumed_iteration is None else self.resumed_run["shapes"]
            check_run(
                module, data, self.trainer, policy, saved, makes_tokenizer=bool(self.warm_start)
            )
            if self.only_prints:
                if self.trainer.is_global_zero:
                    print_prompts(data, str(self.subcommand), self.options.print_prompts)
                raise SystemExit(0)
            if self.subcommand == "fit" and self.resumed_iteration is not None:
                check_resumed(module, data, self.trainer, self.resumed_run)
        if self.warm_start is None or (self.warm_start_dir / "model").exists():
            return
        if self.trainer.global_rank > 0 and not self.fast:
            wait_for(self.warm_start_dir / "model")
            return
        started = time.perf_counter()
        with locked(self.warm_start_dir, wait=True):  # another run may be at it
            if (self.warm_start_dir / "model").exists():
                return
            options = {"subcommand": "fit", "fit": self.warm_start_config}
            SFTCLI(options, SFTModule, Demonstrations)
        self.warm_start_seconds = time.perf_counter() - started

    def before_fit(self) -> None:
        """Run the warm start (SFT), and validate before training."""
        self.prepare()
        if self.fast:  # Lightning's limit counts optimiser steps, of which an iteration has many
            self.trainer.fit_loop.epoch_loop.max_steps = -1
        elif self.resumed_iteration is None:
            self.trainer.validate(self.model, self.datamodule, verbose=False)
            if self.trainer.received_sigterm:  # fit would forget it
                raise SIGTERMException
            with one_line_errors():
                for checkpoint in self.trainer.checkpoint_callbacks:
                    cast(IterationCheckpoint, checkpoint).check_monitor(self.trainer)

    def after_fit(self) -> None:
        """Print the table."""
        if self.resumed_iteration == self.model.iteration and self.trainer.is_global_zero:
            print(
                f"no iteration was left after the {self.resumed_iteration} of the checkpoint; for "
                "more raise trainer.max_epochs, or trainer.max_steps or max_time where given"
            )
        summary = cast(RunSummary, self.config_init[self.subcommand].summary)
        if self.trainer.is_global_zero:
            summary.print_table(self.trainer, self.warm_start_seconds)
        if self.whole is not None and self.trainer.is_global_zero:
            values = self.trainer.callback_metrics
            seconds = float(values["rollout/seconds"] + values["policy/update_seconds"])
            policy, tried = self.model.actor_critic.policy, self.options.as_dict()
            lines = report(self.whole, tried, policy.config, seconds, policy.device)
            print(*lines, sep="\n")

    before_validate = before_test = before_predict = prepare
