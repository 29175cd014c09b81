"""Flags of Lightning's trainer, options that cannot work, and what callbacks watch: each does what
it says, or is refused in one line that names it."""

import inspect
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar

import runs
from tre_lightning import methods
from tre_lightning.cli.checks import warn_of_slow_bfloat16
from tre_lightning.cli.main import PPOCLI, main
from tre_lightning.cli.warm_start import WarmStart
from tre_lightning.methods import LinearSchedule, Method
from tre_lightning.policy.lora import LoraArgs
from tre_lightning.sampling import options as sampling
from tre_lightning.training import options as training

# Every argument of the trainer: values that change nothing of a run, and values that are refused
# with a word of the remedy. An argument of a later Lightning is in neither, and fails the test.
DECIDED: dict[str, tuple[list[str], dict[str, str]]] = {
    "accelerator": (["cpu"], {"abacus": "abacus"}),
    "strategy": (["auto"], {"magic": "magic"}),
    "devices": (["1", "auto"], {"0": "devices"}),
    "num_nodes": (["1"], {"0": "at least 1"}),
    "precision": (["32-true"], {"16-true": "bf16-true"}),
    "logger": (["true"], {}),  # false: below
    "callbacks": ([], {}),  # below
    "fast_dev_run": (["false"], {"-1": "fast_dev_run"}),  # true: below
    "max_epochs": (["2"], {"0": "at least 1", "-2": "max_epochs"}),
    "min_epochs": (["1"], {}),
    "max_steps": (["-1"], {"0": "trainer.max_epochs", "-2": "max_steps"}),
    "min_steps": (["1"], {}),
    "max_time": ([], {"soon": "DD:HH:MM:SS"}),
    "limit_train_batches": (["1.0"], dict.fromkeys(("0", "1", "0.5"), "iterations_per_epoch")),
    "limit_val_batches": (["1.0"], {"0.1": "at least 0.5", "1.5": "limit_val_batches"}),
    "limit_test_batches": (["1"], {"0.1": "at least 0.5"}),
    "limit_predict_batches": (["1"], {"-1": "limit_predict_batches"}),
    "overfit_batches": (["0.0"], {"1": "few rows", "0.5": "few rows"}),
    "val_check_interval": (["1.0"], dict.fromkeys(("1", "0.5"), "iterations_per_epoch")),
    "check_val_every_n_epoch": (["1"], {"0": "at least 1", "null": "at least 1"}),
    "num_sanity_val_steps": (["1"], {}),
    "log_every_n_steps": (["1"], {"0": "trainer.logger=false", "-1": "at least 1"}),
    "enable_checkpointing": (["true"], {}),  # false: below
    "enable_progress_bar": (["true"], {}),  # false: below
    "enable_model_summary": (["true"], {}),
    "accumulate_grad_batches": (["1"], dict.fromkeys(("0", "2"), "model.ppo.num_minibatches")),
    "gradient_clip_val": (["0"], dict.fromkeys(("1", "0.5"), "model.optim.max_grad_norm")),
    "gradient_clip_algorithm": (
        ["null"],
        dict.fromkeys(("norm", "value", "nonsense"), "model.optim.max_grad_norm"),
    ),
    "deterministic": (["true"], {}),
    "benchmark": (["true"], {}),
    "inference_mode": (["false"], {}),
    "use_distributed_sampler": (["false"], {}),
    "profiler": (["simple"], {"nonsense": "simple"}),
    "detect_anomaly": (["true"], {}),
    "barebones": (["false"], {"true": "trainer.profiler=simple"}),
    "plugins": ([], {"lightning.pytorch.plugins.io.AsyncCheckpointIO": "AsyncCheckpointIO"}),
    "sync_batchnorm": (["true"], {}),
    "reload_dataloaders_every_n_epochs": (["1"], {"-1": "reload_dataloaders_every_n_epochs"}),
    "default_root_dir": ([], {"null": "runs/mine", "s3://bucket/run": "runs/mine"}),
    "enable_autolog_hparams": (["false"], {}),
    "model_registry": (["null"], {"somewhere": "leave it out"}),
}
REFUSED = [(name, value, said) for name, (_, no) in DECIDED.items() for value, said in no.items()]


@pytest.fixture
def torch_flags() -> Iterator[None]:
    """What ``deterministic`` and ``benchmark`` set is as before."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.fixture
def refused(tmp_path: Path, refusal: runs.Said) -> Callable[..., str]:
    """The one line of a fit that is refused before any work."""

    def refuse(*flags: str, **options: Any) -> str:
        cache = f"--warm_start.cache_dir={tmp_path}/warm"
        line = refusal(runs.run, tmp_path / "run", cache, *flags, alone=True, **options)
        left = {path.name for path in tmp_path.iterdir()}
        assert left <= {"run.json"}, left
        return line.removeprefix("error: ")

    return refuse


def callbacks(*specs: str | dict[str, Any]) -> dict[str, Any]:
    """Changes of the configuration: these callbacks of Lightning's beside TRE."""
    made: list[Any] = [runs.TRE]
    for spec in specs:
        one = {"class_path": spec} if isinstance(spec, str) else dict(spec)
        if "." not in one["class_path"]:
            one["class_path"] = f"lightning.pytorch.callbacks.{one['class_path']}"
        made.append(one)
    return {"trainer.callbacks": made}


# ----- the trainer's arguments


def test_every_argument_of_the_trainer_is_decided_on() -> None:
    assert set(inspect.signature(Trainer).parameters) == set(DECIDED)


@pytest.mark.parametrize(("name", "value", "said"), REFUSED)
def test_a_flag_without_meaning_is_refused(
    refused: Callable[..., str], name: str, value: str, said: str
) -> None:
    message = refused(f"--trainer.{name}={value}")
    assert f"trainer.{name}" in message and said in message


@pytest.mark.usefixtures("torch_flags")
def test_a_flag_with_a_meaning_changes_no_result(tmp_path: Path) -> None:
    runs.run(tmp_path / "plain")
    flags = [f"--trainer.{name}={yes[0]}" for name, (yes, _) in DECIDED.items() if yes]
    cli = runs.run(tmp_path / "flags", *flags)
    runs.assert_same_run(tmp_path / "plain", tmp_path / "flags")
    assert cli.trainer.limit_test_batches == 1 and torch.are_deterministic_algorithms_enabled()
    tags = runs.scalars(tmp_path / "flags")
    assert tags.keys() == runs.scalars(tmp_path / "plain").keys()


@pytest.mark.parametrize("command", ["sft", "reward"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("accumulate_grad_batches", "0"), ("gradient_clip_val", "-1"), ("overfit_batches", "1")],
)
def test_supervised_commands_have_their_own_rules(
    command: str, name: str, value: str, tmp_path: Path, refusal: runs.Said
) -> None:
    assert f"error: trainer.{name}={value}" in refusal(
        main, [*supervised(command, tmp_path), f"--trainer.{name}={value}"]
    )


def test_several_mistakes_are_one_line(refused: Callable[..., str]) -> None:
    flags = ["--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=1"]
    assert "trainer." in refused(*flags, "--model.ppo.num_epochs=0")
    assert "model.ppo.num_epochs" in refused(*flags, "--model.ppo.num_epochs=two", "--nope=1")
    assert "--trainer.max_epoch" in refused("--trainer.max_epoch=2", *flags)


# ----- flags that leave something out


def test_a_fast_dev_run_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trainer.fast_dev_run=3", f"--warm_start.cache_dir={tmp_path}/warm"]
    for command in ("fit", "validate", "test", "predict"):
        cli = runs.run(tmp_path / "run", *flags, command=command)
        assert {path.name for path in tmp_path.iterdir()} == {"run.json"}
        printed = capsys.readouterr().out
        assert ("nothing was kept" in printed) == (
            command == "fit"
        ) and "predictions" not in printed
        if command == "fit":
            assert cli.model.iteration == 2  # all of the one epoch: not 3 optimiser steps
        assert isinstance(cli, PPOCLI) and not cli.warm_start_dir.exists()


def test_a_fast_dev_run_beside_an_earlier_run(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused("--trainer.fast_dev_run=true", "--ckpt_path=last")
    assert message.startswith("ckpt_path=last") and "trainer.fast_dev_run=True" in message
    runs.run(tmp_path / "run", "--trainer.max_epochs=1")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    before.pop(tmp_path / "run.json")
    runs.run(tmp_path / "run", "--trainer.fast_dev_run=true")
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    after.pop(tmp_path / "run.json")
    assert before == after


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_a_supervised_fast_dev_run_leaves_nothing(command: str, tmp_path: Path) -> None:
    main([*supervised(command, tmp_path), "--trainer.fast_dev_run=true"])
    assert {path.name for path in tmp_path.iterdir()} == {"supervised.json"}


def test_without_checkpoints_progress_and_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: runs.Said
) -> None:
    names = ("enable_checkpointing", "enable_progress_bar", "logger")
    flags = [*(f"--trainer.{name}=false" for name in names), "--trainer.max_epochs=1"]
    runs.run(tmp_path / "run", *flags)
    printed = capsys.readouterr().out
    assert "checkpoints  none (trainer.enable_checkpointing=false)" in printed
    assert "ppo " not in printed  # no line of progress, whose table is there all the same
    assert "held-out prompts" in printed
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.yaml", "model"} and (tmp_path / "run/model/config.json").exists()
    line = refusal(runs.run, tmp_path / "run", *flags)  # the model would be lost
    assert f"trainer.default_root_dir={tmp_path}/run already holds the" in line


def test_the_table_says_when_the_last_validation_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = ("--trainer.check_val_every_n_epoch=2", "--trainer.max_epochs=3")
    runs.run(tmp_path / "run", *every)
    assert "after iteration 4 of 6" in capsys.readouterr().out


def test_without_validations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.run(tmp_path / "run", "--trainer.limit_val_batches=0", "--trainer.max_epochs=1")
    printed = capsys.readouterr().out
    assert "held-out prompts" not in printed and f"model        {tmp_path}/run/model" in printed
    assert not any(tag.startswith("val/") for tag in runs.scalars(tmp_path / "run"))
    assert (tmp_path / "run/model").exists() and runs.saved_iteration(tmp_path / "run") == 2


@pytest.mark.parametrize("profiler", ["simple", "advanced", "pytorch"])
def test_a_profiler_prints_its_report(profiler: str, tmp_path: Path) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    try:
        runs.run(tmp_path / "run", f"--trainer.profiler={profiler}", "--trainer.max_epochs=1")
    finally:
        logger.removeHandler(handler)
    reports = [text for text in said if "Profiler Report" in text]
    assert any(text.startswith("FIT") for text in reports), said
    assert not [text for text in said if "GPU available" in text]  # the rest stays quiet


# ----- seeds, monitors and callbacks


@pytest.mark.parametrize("seed", ["-1", str(2**32), "1.5", "one", "null"])
def test_a_seed_that_is_none_is_refused(refused: Callable[..., str], seed: str) -> None:
    assert "seed_everything" in refused(f"--seed_everything={seed}")


STOPPING = "EarlyStopping"


@pytest.mark.parametrize(
    ("flags", "watching", "flag"),
    [
        (["--checkpoint.monitor=val/nope"], [], "checkpoint.monitor=val/nope"),
        (["--checkpoint.monitor=rollout/score"], [], "checkpoint.monitor=rollout/score"),
        ([], ["val/scor"], "trainer.callbacks EarlyStopping.monitor=val/scor"),
        ([], ["score"], "trainer.callbacks EarlyStopping.monitor=score"),
        (["--trainer.limit_val_batches=0"], ["val/score"], "EarlyStopping.monitor=val/score"),
    ],
)
def test_a_monitor_that_no_set_has_is_refused_before_any_work(
    refused: Callable[..., str], flags: list[str], watching: list[str], flag: str
) -> None:
    stops = [{"class_path": STOPPING, "init_args": {"monitor": tag}} for tag in watching]
    message = refused(*flags, changes=callbacks(*stops))
    assert flag in message and "is not logged" in message
    assert "val/pass@1" in message or "no validation runs" in message


def test_a_monitor_that_no_iteration_logs_is_refused_after_one(
    tmp_path: Path, refusal: runs.Said
) -> None:
    stop = {"class_path": STOPPING, "init_args": {"monitor": "rollout/scor"}}
    line = refusal(runs.run, tmp_path / "run", changes=callbacks(stop))
    assert line.startswith("error: trainer.callbacks EarlyStopping.monitor=rollout/scor")
    assert "rollout/score" in line


def test_callbacks_of_lightning_that_work(tmp_path: Path) -> None:
    stop = {"class_path": STOPPING, "init_args": {"monitor": "rollout/score", "patience": 9}}
    changes = callbacks(stop, "LearningRateMonitor", "RichProgressBar", "ModelSummary")
    cli = runs.run(tmp_path / "run", changes=changes)
    bars = [c for c in cli.trainer.callbacks if c is cli.trainer.progress_bar_callback]
    assert len(bars) == 1 and isinstance(bars[0], RichProgressBar)
    assert runs.saved_iteration(tmp_path / "run") == runs.ITERATIONS


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("ModelCheckpoint", "checkpoint.keep_all"),
        ({"class_path": "OnExceptionCheckpoint", "init_args": {"dirpath": "x"}}, "keep_all"),
        ("tre_lightning.callbacks.checkpoint.IterationCheckpoint", "set checkpoint.*"),
        ("tre_lightning.callbacks.inspection.Inspection", "set inspection.*"),
        ({"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {0: 2}}}, ""),
        ({"class_path": "StochasticWeightAveraging", "init_args": {"swa_lrs": 0.1}}, ""),
        ("BatchSizeFinder", "drop it"),
        ("LearningRateFinder", "drop it"),
        ({"class_path": STOPPING, "init_args": {"monitor": "val/score", "mode": "up"}}, "mode"),
        ({"class_path": "Timer", "init_args": {"duration": "soon"}}, "DD:HH:MM:SS"),
    ],
)
def test_a_callback_that_cannot_work_is_refused(
    refused: Callable[..., str], spec: str | dict[str, Any], said: str
) -> None:
    path = spec if isinstance(spec, str) else spec["class_path"]
    message = refused(changes=callbacks(spec))
    assert "trainer.callbacks" in message and path.rpartition(".")[2] in message and said in message


def test_two_progress_bars_and_no_logger_are_refused(refused: Callable[..., str]) -> None:
    message = refused(changes=callbacks("RichProgressBar", "TQDMProgressBar"))
    assert message.startswith("trainer") and "progress bar" in message
    message = refused("--trainer.logger=false", changes=callbacks("LearningRateMonitor"))
    assert "trainer.callbacks LearningRateMonitor" in message and "trainer.logger=false" in message


# ----- options name themselves in full

GROUPS: dict[str, type] = {
    "model.rollout": sampling.RolloutArgs,
    "model.rollout.vllm": sampling.VLLMArgs,
    "model.evaluation": sampling.EvaluationArgs,
    "model.ppo": training.PPOArgs,
    "model.optim": training.OptimArgs,
    "model.diagnostics": training.DiagnosticsArgs,
    "model.policy.lora": LoraArgs,
    "warm_start": WarmStart,
}


def numbers(kind: Callable[..., Any]) -> list[tuple[str, Any, float]]:
    """The options that are numbers: name, default, and a value that is none of theirs."""
    found = []
    for name, parameter in inspect.signature(kind).parameters.items():
        hint, default = str(parameter.annotation), parameter.default
        if "bool" not in hint and ("int" in hint or "float" in hint) and "Literal" not in hint:
            found.append((name, default, math.nan if "float" in hint else -1))
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_a_number_that_is_none_is_refused_by_its_full_name(group: str) -> None:
    fields = numbers(GROUPS[group])
    assert fields
    for name, default, bad in fields:
        bad: Any = (bad, bad) if isinstance(default, tuple) else bad
        others = {"top_p": None} if name in ("top_k", "min_p") else {}
        with pytest.raises(ValueError, match=rf"^(give )?{group}\.{name}=") as error:
            GROUPS[group](**others, **{name: bad})
        assert str(bad) in str(error.value)


OWN_METHODS = [
    kind
    for kind in vars(methods).values()
    if isinstance(kind, type) and issubclass(kind, Method) and not inspect.isabstract(kind)
]
NEEDED: dict[str, dict[str, Any]] = {"TrustRegionEntropy": {"top_k": 2}}


@pytest.mark.parametrize("kind", [k for k in OWN_METHODS if k is not Method])
def test_a_number_that_is_none_is_refused_by_its_method(kind: type[Method]) -> None:
    for name, _, bad in numbers(kind):
        needed = {} if name in ("top_k", "top_p", "min_p") else NEEDED.get(kind.__name__, {})
        with pytest.raises(ValueError, match=rf"^trainer\.callbacks {kind.__name__}\[\w+\]\.\w+="):
            kind(**needed, **{name: bad})
    schedule = LinearSchedule(-1.0, 0.0, 3)
    if "coef" in inspect.signature(kind).parameters:
        with pytest.raises(ValueError, match=r"^trainer\.callbacks .*\.coef="):
            kind(**NEEDED.get(kind.__name__, {}), coef=schedule)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "flag",
    [
        "data.batch_size",
        "data.init_args.batch_size",
        "data.puzzles.max_intermediate",
        "model.rollout.vllm.max_model_len",
        "model.optim.eps",
        "checkpoint.every_n_iterations",
    ],
)
def test_the_name_in_an_error_is_a_flag(refused: Callable[..., str], flag: str) -> None:
    """What an error calls an option can be typed as it stands."""
    message = refused(f"--{flag}=-1")
    assert flag.replace(".init_args", "") + "=-1" in message


# ----- configurations of the supervised commands


def supervised(command: str, directory: Path) -> list[str]:
    """A tiny ``sft fit`` or ``reward fit``."""
    data: dict[str, Any] = {
        "sft": {
            "class_path": "tre_lightning.tasks.Demonstrations",
            "init_args": {"task": runs.TINY["data"], "steps": 2, "batch_size": 8},
        },
        "reward": {
            "class_path": "tre_lightning.tasks.PreferencePairs",
            "init_args": {"synthetic_size": 12, "val_size": 4, "batch_size": 4, "max_length": 64},
        },
    }
    architecture = {**runs.ARCHITECTURE, "vocab_size": 128, "max_position_embeddings": 64}
    policy = {"architecture": architecture}
    config = {
        "model": {"policy": policy, "output_dir": str(directory / "model"), "lr": 0.02},
        "data": data[command],
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "devices": 1},
    }
    file = directory / "supervised.json"
    file.write_text(json.dumps(config))
    run_dir = f"--trainer.default_root_dir={directory / 'run'}"
    return [command, "fit", "--config", str(file), run_dir]


@pytest.mark.parametrize(
    ("precision", "flags", "warned"),
    [
        ("bf16-mixed", "fpu avx512f", True),
        ("bf16-true", "fpu avx512f", True),
        ("bf16-mixed", "fpu avx512_bf16 avx512f", False),
        ("bf16-mixed", "fp asimd bf16", False),  # of ARM
        ("bf16-mixed", None, False),  # nothing is known
        ("32-true", "fpu avx512f", False),
    ],
)
def test_bfloat16_without_instructions_for_it_is_a_warning(
    precision: Any,
    flags: str | None,
    warned: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n")
    trainer = Trainer(accelerator="cpu", precision=precision, logger=False, barebones=True)
    capsys.readouterr()
    warn_of_slow_bfloat16(trainer, cpuinfo)
    line = capsys.readouterr().err
    assert line.startswith(f"warning: trainer.precision={precision} is slower") == warned
    assert line.count("\n") == int(warned)


def test_a_pretrained_model_is_warmed_up_gently() -> None:
    task: dict[str, Any] = {"class_path": "x.Task", "init_args": {}}
    scratch = {"model": None, "architecture": {"model_type": "llama"}, "tokenizer": None}
    pretrained = {"model": "some/model", "architecture": None, "tokenizer": None}
    for policy, rate in ((scratch, 4e-3), (pretrained, 2e-5)):
        by_default, said = WarmStart(), WarmStart(lr=rate)
        assert by_default.config(Path(), policy, task, 1)["model"]["lr"] == rate
        assert by_default.directory(policy, task, 1) == said.directory(policy, task, 1)
        assert WarmStart(lr=1e-3).directory(policy, task, 1) != said.directory(policy, task, 1)
