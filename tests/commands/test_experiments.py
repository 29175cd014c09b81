"""The paper's experiments: their settings, and a run of each in small."""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

import runs
from tre_lightning.cli.main import PPOCLI, main
from tre_lightning.policy.sharding import check_sharding, shards
from tre_lightning.training.options import OptimArgs

EXPERIMENTS = runs.CONFIGS / "experiment"
METHOD = EXPERIMENTS.parent / "method" / "tre_p.yaml"
SCALE = EXPERIMENTS.parent / "scale"

# Published for all of them.
SHARED: dict[str, Any] = {
    "model.policy.critic": "separate",
    "model.rollout.num_responses": 8,
    "model.rollout.temperature": 1.0,
    "data.init_args.batch_size": 512,
    "model.ppo.num_minibatches": 8,  # of 64 prompts
    "model.ppo.num_epochs": 1,
    "model.ppo.clip_eps_low": 0.2,
    "model.ppo.clip_eps_high": 0.2,
    "model.ppo.dual_clip": 3.0,
    "model.ppo.gamma": 1.0,
    "model.ppo.gae_lambda": 1.0,
    "model.ppo.kl_coef": 0.0,
    "model.optim.lr": 1e-6,
    "model.optim.critic_lr": 1e-5,
    "model.optim.warmup_iterations": 0,
    "model.optim.warmup_fraction": 0.05,
    "model.optim.final_lr_fraction": 1.0,
    "model.evaluation.temperature": 1.0,
    "model.evaluation.top_p": 0.7,
    "warm_start": None,
}
MATH = {
    "data.class_path": "tre_lightning.tasks.MathDataModule",
    "data.init_args.train_file": "DigitalLearningGmbH/MATH-lighteval",
    "data.init_args.train_split": "train",
    "data.init_args.eval_file": "DigitalLearningGmbH/MATH-lighteval",
    "data.init_args.eval_split": "test",
    "model.rollout.max_new_tokens": 8192,
}
COUNTDOWN = {
    "data.class_path": "tre_lightning.tasks.CountdownDataModule",
    "data.init_args.train_file": "Jiayi-Pan/Countdown-Tasks-3to4",
    "data.init_args.train_split": "train",
    "data.init_args.train_size": 7500,
    "data.init_args.test_size": 5000,
    "data.init_args.eval_file": None,
    "model.rollout.max_new_tokens": 512,
}
HH = {
    "data.class_path": "tre_lightning.tasks.PreferenceDataModule",
    "data.init_args.train_file": "HuggingFaceH4/ultrafeedback_binarized",
    "data.init_args.train_split": "train_prefs",
    "data.init_args.exclude_file": "Anthropic/hh-rlhf",
    "data.init_args.exclude_split": "train",
    "data.init_args.train_size": 7500,
    "data.init_args.test_size": 5000,
    "data.init_args.reward.model": "runs/hh_reward/model",
    "model.rollout.max_new_tokens": 1024,
}
SMALL: dict[str, Any] = {"model.policy.model": "Qwen/Qwen2.5-1.5B-Instruct"}
LARGE: dict[str, Any] = {"model.policy.model": "Qwen/Qwen2.5-7B-Instruct"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "math_1.5b": {**MATH, **SMALL},
    "math_7b": {**MATH, **LARGE},
    "countdown_1.5b": {**COUNTDOWN, **SMALL},
    "countdown_7b": {**COUNTDOWN, **LARGE},
    "hh_1.5b": {**HH, **SMALL},
    "hh_7b": {**HH, **LARGE},
}


def test_every_experiment_is_here() -> None:
    files = {path.stem for path in EXPERIMENTS.glob("*.yaml")}
    assert files == {*PUBLISHED, "paper"}


def words(name: str) -> list[str]:
    return ["fit", "--config", f"{EXPERIMENTS / name}.yaml", "--config", str(METHOD)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_settings_are_those_published(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building the run asks for nothing of the hub."""
    monkeypatch.setattr(PPOCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = main([*words(name), "--trainer.accelerator=cpu"])
    assert isinstance(cli, PPOCLI)
    found = {key: cli.options.get(key, "none") for key in {**SHARED, **PUBLISHED[name]}}
    assert found == {**SHARED, **PUBLISHED[name]}
    assert cli.options.model.policy.gradient_checkpointing is True
    assert cli.options.model.policy.lora is None  # all weights are trained
    assert cli.run_dir == f"runs/{name}"
    assert cli.trainer.precision == "bf16-mixed"
    terms = [term for term in cli.trainer.callbacks if term.__class__.__name__.startswith("Trust")]
    assert len(terms) == 1
    # 150 iterations, of which round(7.5) warm up.
    iterations = cli.trainer.max_epochs * cli.datamodule.iterations_per_epoch
    shares = [cli.model.optim_args.lr_fraction(i, iterations) for i in range(iterations)]
    assert shares == [i / 8 for i in range(1, 9)] + [1.0] * 142


def test_the_rows_of_the_hub_are_split_as_in_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Countdown by the order of the rows, MATH by the splits of its dataset."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(PPOCLI, "_run_subcommand", lambda self, subcommand: None)
    asked = []

    def load(name: str, split: str) -> Iterator[dict[str, Any]]:
        asked.append((name, split))
        if "MATH" in name:
            return iter([{"problem": f"{split}?", "level": "1", "solution": r"\boxed{1}"}])
        return ({"nums": [n, 1, 1], "target": n} for n in itertools.count(1))

    monkeypatch.setattr(datasets, "load_dataset", load)
    puzzles = main([*words("countdown_1.5b"), "--trainer.accelerator=cpu"]).datamodule
    held_out = {stage: puzzles.heldout_prompts(stage)[stage] for stage in ("test", "val")}
    numbers = {stage: [p.extra["target"] for p in found] for stage, found in held_out.items()}
    assert numbers == {"test": [*range(7501, 12501)], "val": [*range(12501, 12757)]}
    trained = [puzzles.train_prompt(index).extra["target"] for index in range(7500)]
    assert sorted(trained) == [*range(1, 7501)]
    assert asked == [("Jiayi-Pan/Countdown-Tasks-3to4", "train")]

    asked.clear()
    problems = main([*words("math_1.5b"), "--trainer.accelerator=cpu"]).datamodule
    assert problems.train_prompt(0).text.startswith("train? ")
    for stage in ("val", "test"):
        assert [p.text.split()[0] for p in problems.heldout_prompts(stage)[stage]] == ["test?"]
    name = "DigitalLearningGmbH/MATH-lighteval"
    assert sorted(asked) == [(name, "test"), (name, "train")]


@pytest.mark.parametrize(
    ("share", "total", "expected"),
    [
        (0.5, 4, [0.5, 1.0, 1.0, 1.0]),
        (0.05, 60, [1 / 3, 2 / 3, 1.0, 1.0]),  # 0.05 * 60 is a little more than 3
        (0.29, 100, [1 / 29, 2 / 29, 3 / 29, 4 / 29]),  # and 0.29 * 100 a little less than 29
        (0.05, 4, [1.0, 1.0, 1.0, 1.0]),  # no whole iteration
        (0.0, float("inf"), [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_warm_up_may_be_a_share_of_the_run(
    share: float, total: float, expected: list[float]
) -> None:
    optim = OptimArgs(warmup_fraction=share)
    assert [optim.lr_fraction(i, total) for i in range(4)] == pytest.approx(expected)


def test_the_rate_decays_after_a_warm_up_of_a_fraction() -> None:
    optim = OptimArgs(warmup_fraction=0.25, final_lr_fraction=0.5)
    shares = [optim.lr_fraction(i, 8) for i in range(8)]
    assert shares == pytest.approx([0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5])


# ----- in small


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """A policy, a reward model and data of each task, all of them tiny and local.

    The tokens are bytes: the prompts are English.
    """
    root = tmp_path_factory.mktemp("small")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<pad>", "<eos>", *alphabet])}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>"
    )
    fields = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "policy")
    judge = AutoConfig.for_model("qwen2", **fields, num_labels=1, initializer_range=0.5)
    AutoModelForSequenceClassification.from_config(judge).save_pretrained(root / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(root / name)
    rows: dict[str, list[dict[str, Any]]] = {
        "math": [
            {"problem": f"What is {n} + 1?", "solution": rf"It is \boxed{{{n + 1}}}."}
            for n in range(4)
        ],
        "held_out": [{"problem": "What is 9 + 1?", "solution": r"It is \boxed{10}."}],
        "countdown": [{"nums": [n, 2, 3], "target": n + 5} for n in range(1, 7)],
        "hh": [{"prompt": f"Tell me of {n}."} for n in range(8)],
        "seen": [{"prompt": "Tell me of 3."}],
    }
    for name, listed in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in listed)
        (root / f"{name}.jsonl").write_text(text)
    return {path.stem: str(path) for path in root.iterdir()}


FILES: dict[str, dict[str, str]] = {
    "math": {"train_file": "{math}", "eval_file": "{held_out}", "workers": "1"},
    "countdown": {
        "train_file": "{countdown}",
        "train_size": "4",
        "test_size": "1",
        "val_size": "1",
        "max_prompt_length": "512",  # bytes
    },
    "hh": {
        "train_file": "{hh}",
        "exclude_file": "{seen}",
        "train_size": "4",
        "test_size": "1",
        "val_size": "1",
        "reward.model": "{reward}",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_run_in_small(name: str, tmp_path: Path, small: Mapping[str, str]) -> None:
    """Everything else is the experiment's: the task, the update, the precision, the method."""
    pytest.importorskip("math_verify")
    data = {**FILES[name.split("_")[0]], "batch_size": "2", "iterations_per_epoch": "1"}
    flags = [f"--data.init_args.{key}={value.format(**small)}" for key, value in data.items()]
    main(
        [
            *words(name),
            *flags,
            f"--model.policy.model={small['policy']}",
            "--model.rollout.max_new_tokens=6",
            "--trainer.max_epochs=1",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            f"--trainer.default_root_dir={tmp_path}/run",
        ]
    )
    assert runs.saved_iteration(tmp_path / "run") == 1
    logged = runs.scalars(tmp_path / "run")
    assert logged["policy/lr"] == [(0, pytest.approx(1e-6))]
    assert "loss/tre_effective_coef" in logged
    assert (tmp_path / "run" / "model" / "config.json").is_file()


# ----- devices


@pytest.mark.parametrize(
    ("layer", "ranks", "sharded"), [("1gpu", 1, False), ("8gpu", 8, True), ("2x8gpu", 16, True)]
)
def test_the_layers_of_devices_go_on_top(
    layer: str, ranks: int, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PPOCLI, "_run_subcommand", lambda self, subcommand: None)
    scale = ["--config", f"{SCALE / layer}.yaml"]
    cli = main([*words("math_7b"), *scale, "--trainer.accelerator=cpu"])
    assert cli.trainer.world_size == ranks and cli.trainer.precision == "bf16-mixed"
    assert shards(cli.trainer) == sharded
    check_sharding(cli.trainer, adapters=False)
    adapters = ["--config", str(SCALE.parent / "memory" / "lora.yaml")]
    cli = main([*words("math_7b"), *adapters, *scale, "--trainer.accelerator=cpu"])
    assert cli.model.policy_args.lora.bfloat16_base is True


def test_offload_goes_behind_the_layer_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PPOCLI, "_run_subcommand", lambda self, subcommand: None)
    files = (SCALE / "8gpu.yaml", SCALE.parent / "memory" / "cpu_offload.yaml")
    layers = [word for file in files for word in ("--config", str(file))]
    cli = main([*words("math_7b"), *layers, "--trainer.accelerator=cpu"])
    assert cli.model.policy_args.cpu_offload is True and shards(cli.trainer)
    assert cli.trainer.world_size == 8 and cli.trainer.precision == "bf16-mixed"
    assert cli.trainer.strategy.process_group_backend == "cpu:gloo,cuda:nccl"
    check_sharding(cli.trainer, adapters=False, cpu_offload=True)  # one file a checkpoint


def test_every_layer_of_devices_is_here() -> None:
    assert {path.stem for path in SCALE.glob("*.yaml")} == {"1gpu", "8gpu", "2x8gpu"}


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (0, "trainer.accelerator=gpu, and this machine has no GPU"),
        (2, "trainer.devices=8, and this machine has 2 GPU(s); give --trainer.devices 2"),
    ],
)
def test_gpus_that_are_not_there(
    gpus: int, message: str, monkeypatch: pytest.MonkeyPatch, refusal: runs.Said
) -> None:
    monkeypatch.setattr(CUDAAccelerator, "auto_device_count", lambda: gpus)
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: False)
    line = refusal(main, [*words("math_7b"), "--config", f"{SCALE}/8gpu.yaml"], alone=True)
    assert message in line
