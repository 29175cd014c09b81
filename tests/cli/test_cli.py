"""Configurations: what cannot work is refused in one line before any work; what can, composes."""

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml

import runs
from tre_lightning.cli.main import PPOCLI, main
from tre_lightning.common.errors import one_line
from tre_lightning.methods import LossTerm, find_methods

OTHER_SIZE = {**runs.ARCHITECTURE, "hidden_size": 32}


@pytest.fixture
def parsed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands stop where the work would begin."""
    monkeypatch.setattr(PPOCLI, "_run_subcommand", lambda self, subcommand: None)


# ----- refused


def tre(**init_args: Any) -> dict[str, Any]:
    spec = {"class_path": "tre_lightning.methods.TrustRegionEntropy", "init_args": init_args}
    return {"trainer.callbacks": [spec]}


ONE = "give exactly one of top_k, top_p and min_p"

# Flags of the tiny run, and words of the message; {dir} is a directory.
REFUSED_FLAGS = [
    ("--warm_start.stepz=1", "warm_start | stepz"),
    ("--nonsense 3", "--nonsense"),
    ("--trainer.max_step 3", "--trainer.max_step"),
    ("--trainer.max_epochs=many", "trainer.max_epochs | int | many"),
    ("--model.ppo.num_epochs=two", "model.ppo.num_epochs | int | two"),
    ("--data.init_args.batch_size=1.5", "batch_size | int | 1.5"),
    ("--data.init_args.train_file={dir}/empty.jsonl", "data.train_file | no puzzle | add rows"),
    ("--data.init_args.eval_file={dir}/bad.jsonl", "bad.jsonl:2 | JSON"),
    (
        "--data.init_args.eval_file={dir}/no.jsonl",
        "data.eval_file | no.jsonl | cannot be read | No such file",
    ),
    ("--data.init_args.train_size=3", "data.train_size=3 | train_file"),
    ("--data.init_args.max_prompt_length=5", "data.max_prompt_length=5 | 6 tokens | raise it"),
    ("--model.rollout.max_new_tokens=28", "model.rollout.max_new_tokens=28 | 32 tokens | lower it"),
    (
        "--model.ppo.num_minibatches=17",
        "model.ppo.num_minibatches=17 | data.batch_size=4 | lower it",
    ),
    (
        "--trainer.max_epochs=-1 --model.optim.warmup_fraction=0.05",
        "optim.warmup_fraction=0.05 | trainer.max_epochs",
    ),
    (
        "--model.optim.warmup_iterations=2 --model.optim.warmup_fraction=0.05",
        "optim.warmup_iterations=2 | optim.warmup_fraction=0.05 | not both",
    ),
    ("--config={dir}/no.yaml", "config | no.yaml | not exist"),
    ("--model.policy.tokenizer=${nowhere}", "nowhere | model.policy.tokenizer"),
    ("--ckpt_path={dir}/no.ckpt", "ckpt_path={dir}/no.ckpt | does not exist"),
    ("--ckpt_path=last", "ckpt_path=last | does not exist | default_root_dir"),
    ("--ckpt_path=best", "ckpt_path=best | does not exist"),
    ("--ckpt_path={dir}/bad.jsonl", "ckpt_path={dir}/bad.jsonl | not a checkpoint"),
    ("--ckpt_path={ckpt} --model.policy.critic=shared", "another model | critic"),
    (
        "--ckpt_path={ckpt} --model.policy.critic=none --model.ppo.estimator=grpo",
        "another model | critic",
    ),
    (
        "--model.policy.critic=none",
        "model.policy.critic=none | model.ppo.estimator=gae | set critic to separate or shared",
    ),
    (
        "--model.ppo.estimator=rloo",
        "model.policy.critic=separate | model.ppo.estimator=rloo | set critic to none",
    ),
    ("--model.ppo.estimator=reinforce++", "model.ppo.estimator | reinforce_pp | reinforce++"),
    ("--model.policy.model={dir}", "exactly one | model.policy.model | model.policy.architecture"),
    ("--model.policy.critic_model={dir}", "model.policy.critic_model={dir}"),
    ("--trainer.precision=16-true", "trainer.precision=16-true | bf16"),
    ("--warm_start.steps=0", "warm_start.steps=0 | at least 1"),
    ("--checkpoint.every_n_iterations=0", "checkpoint.every_n_iterations=0"),
]
# name: (flags, changes of the tiny configuration, words of the message).
REFUSED: dict[str, tuple[list[str], Mapping[str, Any], list[str]]] = {
    **{flags: (flags.split(), {}, said.split(" | ")) for flags, said in REFUSED_FLAGS},
    "unknown key": ([], {"model.polcy": {"model": "x"}}, ["model.polcy", "--help"]),
    "unknown nested key": ([], {"model.policy.modle": "x"}, ["model.policy.modle"]),
    "unknown data key": ([], {"data.init_args.batchsize": 3}, ["data", "batchsize"]),
    "unknown callback key": ([], tre(topk=2), ["TrustRegionEntropy", "topk"]),
    "unknown class": ([], {"data.class_path": "tre_lightning.tasks.Nope"}, ["data", "Nope"]),
    "type of coef": ([], tre(top_k=2, coef="big"), ["coef", "float", "big"]),
    "negative coef": ([], tre(top_k=2, coef=-1), ["tre", "coef=-1", "0 (off)"]),
    "top_k and top_p": ([], tre(top_k=2, top_p=0.9), [ONE, "top_k=2", "top_p=0.9"]),
    "neither": ([], tre(), [ONE, "top_k=None", "top_p=None"]),
    "top_p above 1": ([], tre(top_p=1.5), ["top_p=1.5", "between 0 and 1"]),
    "top_k and min_p": ([], tre(top_k=2, min_p=0.1), [ONE, "top_k=2", "min_p=0.1"]),
    "top_p and min_p": ([], tre(top_p=0.9, min_p=0.1), [ONE, "top_p=0.9", "min_p=0.1"]),
    "min_p 0": ([], tre(min_p=0), ["tre", "min_p=0", "between 0 and 1"]),
    "top_k 0": ([], tre(top_k=0), ["top_k=0", "at least 1"]),
    "diagnostics": ([], {"model.diagnostics": {"top_k": 2, "top_p": 0.9}}, [ONE]),
    "two regions of the diagnostics": (
        [],
        {"model.diagnostics": {"min_p": 0.1}},
        ["model.diagnostics", ONE, "top_p=0.99", "min_p=0.1"],
    ),
    "min_p of the diagnostics": (
        [],
        {"model.diagnostics": {"top_p": None, "min_p": 1.0}},
        ["model.diagnostics.min_p=1.0", "between 0 and 1"],
    ),
    "names": ([], {"trainer.callbacks": [runs.TRE, runs.TRE]}, ["2 methods", "'tre'", "own name"]),
    "other size": (
        ["--ckpt_path={ckpt}"],
        {"model.policy.architecture": OTHER_SIZE},
        ["another model", "16", "32", "configuration"],
    ),
    "group of one": (
        ["--model.policy.critic=none", "--model.ppo.estimator=grpo"],
        {"model.rollout": {"num_responses": 1, "max_new_tokens": 8}},
        ["model.rollout.num_responses=1", "model.ppo.estimator=grpo", "at least 2"],
    ),
    "null critic": (
        [],
        {"model.policy": {"architecture": runs.ARCHITECTURE, "critic": None}},
        ["policy.critic=None", "separate, shared, none"],
    ),
    "no model": ([], {"model.policy": {}}, ["exactly one", "model.policy.model"]),
    "no model directory": (
        ["--model.policy.model={dir}/no"],
        {"model.policy": {}, "warm_start": None},
        ["model.policy.model={dir}/no", "could not be loaded"],
    ),
    "no hub": (
        ["--model.policy.model=some/model"],
        {"model.policy": {}, "warm_start": None},
        ["model.policy.model=some/model", "could not be loaded"],
    ),
    "no tokenizer": ([], {"warm_start": None}, ["model.policy.tokenizer", "warm_start"]),
    "no model_type": ([], {"model.policy.architecture": {"hidden_size": 16}}, ["model_type"]),
    "vocabulary": (
        [],
        {"model.policy.architecture": {**runs.ARCHITECTURE, "vocab_size": 20}},
        ["vocab_size=20", "raise it"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(
    case: str, finished: Path, tmp_path: Path, refusal: runs.Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"nums": [1, 2], "target": 3}\n{"nums": [1, 2], "tar\n')
    paths = {"dir": str(tmp_path), "ckpt": f"{finished}/checkpoints/last.ckpt"}

    def fill(text: str) -> str:
        return text if "$" in text else text.format(**paths)

    flags, changes, message = REFUSED[case]
    run_dir, cache = tmp_path / "run", tmp_path / "warm_starts"
    if "warm_start" not in changes:
        flags = [*flags, f"--warm_start.cache_dir={cache}"]
    line = refusal(runs.run, run_dir, *map(fill, flags), changes=changes, alone=True)
    assert len(line) < 560 and all(word in line for word in map(fill, message)), line
    assert not run_dir.exists() and not cache.exists()  # nothing written, nothing trained


@pytest.mark.parametrize("from_another", [False, True])
def test_an_earlier_run_is_not_overwritten(
    finished: Path, tmp_path: Path, refusal: runs.Said, from_another: bool
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    message = refusal(
        runs.run,
        run_dir,
        *([f"--ckpt_path={finished}/checkpoints/last.ckpt"] if from_another else []),
    )
    for word in ("error: ", f"trainer.default_root_dir={run_dir}", "--ckpt_path last"):
        assert word in message
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_traceback_for_those_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRE_DEBUG", "1")
    with pytest.raises(ValueError, match="every_n_iterations=0"):
        runs.run(tmp_path / "run", "--checkpoint.every_n_iterations=0")


def test_one_line_keeps_what_is_told() -> None:
    assert one_line("a plain\n  message") == "a plain; message"
    union = (
        'Parser key "n":\n  Does not validate against any of the Union subtypes\n  Subtypes: [..]\n'
        "  Errors:\n    - Expected a <class 'int'>\n    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'str'>\n  Given value: many\n"
    )
    errors = "Expected a int; Expected a NoneType; Given value: many"
    assert one_line(union) == f'Parser key "n": {errors}'
    nested = union.replace("\n", "\n        ").replace("Parser", "- Parser")
    several = (
        'Parser key "m":\n\n  - Expected a path but x is none\n  - Does not validate\n  Errors:\n'
        f"    - Problem with A:\n        {nested.rstrip()}\n    - Not a B\n      B may be one of:\n"
        "      - b\n    - Problem with C:\n        no C\n  Given value type: t\n  Given value: x"
    )
    told = f'Parser key "m": Problem with A: Parser key "n": {errors}'
    assert one_line(several) == told
    assert one_line("Errors:\n") == "Errors:"  # nothing else was said
    assert one_line("Some things:\n  - a\n  b:\n    c\nall") == "Some things: a; b: c; all"
    assert len(one_line("x" * 100_000)) < 520


# ----- composed


def fit(*words: str) -> PPOCLI:
    cli = main(["fit", *words])
    assert isinstance(cli, PPOCLI)
    return cli


def loss_terms(cli: PPOCLI) -> list[LossTerm]:
    return [term for term in cli.trainer.callbacks if isinstance(term, LossTerm)]


@pytest.mark.usefixtures("parsed_only")
@pytest.mark.parametrize(("given", "seed"), [("5", 5), (None, 42)])
def test_one_seed_for_all(tmp_path: Path, given: str | None, seed: int) -> None:
    flags = [] if given is None else [f"--seed_everything={given}"]
    cli = fit(*runs.words(tmp_path / "run", *flags)[1:])
    assert cli.model.seed == cli.datamodule.seed == torch.initial_seed() == seed


@pytest.mark.usefixtures("parsed_only")
@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("given", ["true", "false"])
def test_one_drawn_seed_for_all(
    tmp_path: Path, command: str, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []
    for _ in range(2):
        words = runs.words(tmp_path / "run", f"--seed_everything={given}", command=command)
        cli = main(words)
        assert isinstance(cli, PPOCLI)
        seed = cli.model.seed
        assert cli.datamodule.seed == torch.initial_seed() == cli.options.seed_everything == seed
        assert cli.warm_start_config["seed_everything"] == seed
        assert cli.warm_start_config["data"]["init_args"]["task"]["init_args"]["seed"] == seed
        assert f"--seed_everything {seed} repeats it" in capsys.readouterr().out
        drawn.append(seed)
    assert drawn[0] != drawn[1]


@pytest.mark.usefixtures("parsed_only")
def test_a_rank_takes_the_seed_that_the_first_one_drew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: runs.Said
) -> None:
    words = runs.words(tmp_path / "run", "--seed_everything=true")[1:]
    seed = fit(*words).model.seed
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fit(*words).model.seed == seed
    monkeypatch.delenv("TRE_LIGHTNING_SEED")  # started by torchrun, which knows no seed
    assert "seed_everything=true draws a seed" in refusal(fit, *words)


def test_a_drawn_seed_is_written_down_and_goes_on(tmp_path: Path) -> None:
    run_dir, drawn = tmp_path / "run", "--seed_everything=true"
    first = runs.run(run_dir, drawn, "--trainer.max_epochs=1")
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    seed = first.model.seed
    assert saved["seed_everything"] == seed == first.datamodule.seed
    assert runs.run(run_dir, drawn, "--ckpt_path=last").model.seed == seed
    assert runs.run(run_dir, drawn, "--ckpt_path=best", command="test").datamodule.seed == seed


@pytest.mark.usefixtures("parsed_only")
def test_a_later_file_appends_callbacks(tmp_path: Path) -> None:
    words = runs.words(tmp_path / "run")[1:]
    more = tmp_path / "more.yaml"
    more.write_text("trainer: {callbacks+: [{class_path: tre_lightning.methods.EntropyBonus}]}")
    assert [term.name for term in loss_terms(fit(*words))] == ["tre"]
    terms = loss_terms(fit(*words, "--config", str(more)))
    assert [term.name for term in terms] == ["tre", "entropy"]
    flag = "--trainer.callbacks+=tre_lightning.methods.EntropyBonus"
    assert [term.name for term in loss_terms(fit(*words, flag))] == ["tre", "entropy"]


@pytest.mark.usefixtures("parsed_only")
def test_a_reference_follows_the_command_line(tmp_path: Path) -> None:
    warm_start = {"steps": 3, "cache_dir": "${trainer.default_root_dir}/warm"}
    changes = {"warm_start": warm_start}
    words = runs.words(tmp_path / "run", changes=changes)[1:]
    cli = fit(*words, f"--trainer.default_root_dir={tmp_path}/other")
    assert cli.warm_start is not None
    assert cli.warm_start.cache_dir == f"{tmp_path}/other/warm"


@pytest.mark.usefixtures("parsed_only")
def test_the_tokenizer_is_that_of_the_policy(tmp_path: Path, finished: Path) -> None:
    changes = {"model.policy": {"model": f"{finished}/model"}, "warm_start": None}
    cli = fit(*runs.words(tmp_path / "run", changes=changes)[1:])
    assert cli.datamodule.tokenizer_source == f"{finished}/model"


def whole_configs() -> list[list[Path]]:
    """Files under configs/ that are a configuration together."""
    tasks, models, methods = (
        sorted((runs.CONFIGS / kind).glob("*.yaml")) for kind in ("task", "model", "method")
    )
    combinations = {*itertools.product(tasks, models, methods[:1])}
    combinations |= {*itertools.product(tasks, models[-1:], methods)}
    combinations |= {
        (path, estimator)
        for path in runs.CONFIGS.glob("*.yaml")
        for estimator in (runs.CONFIGS / "estimator").glob("*.yaml")
    }
    return [[path] for path in sorted(runs.CONFIGS.glob("*.yaml"))] + sorted(
        map(list, combinations)
    )


@pytest.mark.usefixtures("parsed_only")
@pytest.mark.parametrize(
    "files", whole_configs(), ids=lambda files: "+".join(path.stem for path in files)
)
def test_shipped_configurations_can_be_built(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.ROOT)  # their paths are relative to it
    words = [word for path in files for word in ("--config", str(path))]
    cli = fit(*words, f"--trainer.default_root_dir={tmp_path}/run", "--trainer.accelerator=cpu")
    callbacks = []
    for path in files:
        trainer = yaml.safe_load(path.read_text()).get("trainer", {})
        callbacks += trainer.get("callbacks", []) + trainer.get("callbacks+", [])
    methods = find_methods(cli.trainer.callbacks)
    built = [f"{type(method).__module__}.{type(method).__name__}" for method in methods]
    assert [name.split(".")[-1] for name in built] == [
        spec["class_path"].split(".")[-1] for spec in callbacks
    ]
    assert cli.trainer.max_epochs > 0 and not (tmp_path / "run").exists()
    # An estimator's name is its file's: the last one, or a layer of it.
    layers = map(Path, yaml.safe_load(files[-1].read_text()).get("layers", []))
    named = [path.stem for path in (files[-1], *layers) if path.parent.name == "estimator"]
    estimator = named[0] if named else "gae"
    assert cli.model.ppo_args.estimator == estimator
    assert (cli.model.policy_args.critic == "none") == (estimator != "gae")


def test_a_number_outside_the_vocabulary_is_refused(tmp_path: Path, refusal: runs.Said) -> None:
    puzzles = tmp_path / "eval.jsonl"
    puzzles.write_text('{"nums": [3, 31], "target": 28}\n')
    message = refusal(
        runs.run, tmp_path / "run", changes={"data.init_args.eval_file": str(puzzles)}
    )
    assert f"{puzzles}:1: the prompt '3 31 = 28 :' holds a word that the tokenizer" in message
    assert not (tmp_path / "run").exists()


def test_the_quick_start_is_its_layers_in_small(tmp_path: Path, shown: runs.Said) -> None:
    layers = ["task/countdown.yaml", "model/tiny.yaml", "method/tre_p.yaml"]
    smaller = [
        "--model.policy.architecture.vocab_size=1024",
        "--model.policy.architecture.initializer_range=0.05",
        "--warm_start.steps=600",
        "--warm_start.misleading_fraction=0",
        "--data.init_args.iterations_per_epoch=20",
        "--trainer.max_epochs=6",
    ]
    printed = []
    for files, options in ((["countdown_tiny.yaml"], []), (layers, smaller)):
        words = [word for name in files for word in ("--config", str(runs.CONFIGS / name))]
        words = ["fit", *words, f"--trainer.default_root_dir={tmp_path}", *options]
        printed.append(yaml.safe_load(shown(main, [*words, "--print_config"])))
    assert printed[0] == printed[1] and printed[0]["trainer"]["max_epochs"] == 6


def test_the_help_is_readable(shown: runs.Said) -> None:
    printed = shown(main, ["fit", "--help"])
    for option in ("--model.ppo.num_minibatches", "--checkpoint.keep_all", "--warm_start"):
        assert option in printed
