"""The paper's experiments: their settings, and a run of each in small."""

import contextlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
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
from tre_lightning.methods.hooks import find_methods
from tre_lightning.policy.sharding import check_sharding, shards
from tre_lightning.training.optim import decaying_adamw, total_batches
from tre_lightning.training.options import OptimArgs

EXPERIMENTS = runs.CONFIGS / "experiment"
METHOD = EXPERIMENTS / "method" / "tre_p.yaml"
REWARD = EXPERIMENTS.parent / "reward"
SCALE = EXPERIMENTS.parent / "scale"

# By the authors' scripts, for all of them.
SHARED: dict[str, Any] = {
    "seed_everything": 42,
    "model.policy.critic": "separate",
    "model.policy.lora": None,  # all weights are trained
    "model.policy.gradient_checkpointing": True,
    "model.rollout.num_responses": 8,
    "model.rollout.temperature": 1.0,
    "data.init_args.batch_size": 512,
    "data.init_args.max_prompt_length": 1024,
    "data.init_args.long_prompts": "drop",
    "data.init_args.system": "default",
    "data.init_args.template_file": None,
    "model.ppo.estimator": "gae",
    "model.ppo.whiten_advantages": True,
    "model.ppo.value_clip_eps": 0.5,
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
    "model.optim.warmup_fraction": 0.0,
    "model.optim.critic_warmup_iterations": None,
    "model.optim.critic_warmup_fraction": 0.05,
    "model.optim.final_lr_fraction": 1.0,
    "model.optim.weight_decay": 0.01,
    "model.optim.max_grad_norm": 1.0,
    "model.optim.betas": (0.9, 0.999),
    "model.evaluation.num_responses": 1,
    "model.evaluation.temperature": 1.0,
    "model.evaluation.top_p": 0.7,
    "trainer.precision": "bf16-mixed",
    "warm_start": None,
}
MATH = {
    "data.class_path": "tre_lightning.tasks.MathDataModule",
    "data.init_args.train_file": "DigitalLearningGmbH/MATH-lighteval",
    "data.init_args.train_split": "train",
    "data.init_args.eval_file": "DigitalLearningGmbH/MATH-lighteval",
    "data.init_args.eval_split": "test",
    "data.init_args.test_file": None,  # validated on the whole test set
    "data.init_args.answer_in": "box",
    "data.init_args.grader": "hendrycks",
    "model.rollout.max_new_tokens": 8192,
}
COUNTDOWN = {
    "data.class_path": "tre_lightning.tasks.CountdownDataModule",
    "data.init_args.train_file": "Jiayi-Pan/Countdown-Tasks-3to4-Unique",
    "data.init_args.train_split": "train",
    "data.init_args.train_size": 7500,
    "data.init_args.test_size": 5000,
    "data.init_args.val_size": None,  # validated on the test set
    "data.init_args.format": "think_answer",
    "data.init_args.strict": True,
    "data.init_args.eval_file": None,
    "model.rollout.max_new_tokens": 512,
}
HH = {
    "data.class_path": "tre_lightning.tasks.PreferenceDataModule",
    "data.init_args.train_file": "trl-lib/ultrafeedback_binarized",
    "data.init_args.train_split": "train",
    "data.init_args.shuffle_seed": 42,
    "data.init_args.eval_file": None,
    "data.init_args.exclude_file": None,  # the reward model has seen these prompts
    "data.init_args.train_size": 7500,
    "data.init_args.test_size": 5000,
    "data.init_args.val_size": None,
    "data.init_args.reward.url": None,
    "data.init_args.reward.max_length": None,
    "model.rollout.max_new_tokens": 1024,
}
SMALL: dict[str, Any] = {"model.policy.model": "Qwen/Qwen2.5-1.5B-Instruct"}
LARGE: dict[str, Any] = {"model.policy.model": "Qwen/Qwen2.5-7B-Instruct"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "math_1.5b": {**MATH, **SMALL},
    "math_7b": {**MATH, **LARGE},
    "countdown_1.5b": {**COUNTDOWN, **SMALL},
    "countdown_7b": {**COUNTDOWN, **LARGE},
    "hh_1.5b": {**HH, **SMALL, "data.init_args.reward.model": "runs/hh_reward_1.5b/model"},
    "hh_7b": {**HH, **LARGE, "data.init_args.reward.model": "runs/hh_reward_7b/model"},
}
# Iterations, and those between two validations.
LENGTHS = {
    "math_1.5b": (30 * 14, 5),
    "math_7b": (30 * 14, 5),
    "countdown_1.5b": (29 * 14, 20),
    "countdown_7b": (29 * 14, 5),
    "hh_1.5b": (200 * 14, 20),
    "hh_7b": (200 * 14, 5),
}
CLIPPED = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "dual_clip": 3.0}
# What a method adds; the clipping is the same in all of them.
METHODS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "ppo": [],
    "entropy": [("EntropyBonus", {"coef": 0.001})],
    "tre_k": [("TrustRegionEntropy", {"top_k": 2, "coef": 0.001})],
    "tre_p": [("TrustRegionEntropy", {"top_p": 0.99, "coef": 0.001})],
    "forking_tokens": [("ForkingTokens", {"fraction": 0.2, "average_over": "selected"})],
    "kl_cov": [("KLCov", {"fraction": 0.002, "coef": 1.0})],
}


def test_every_experiment_is_here() -> None:
    files = {path.stem for path in EXPERIMENTS.glob("*.yaml")}
    assert files == {*PUBLISHED, "paper", "hh_1.5b_unseen", "hh_7b_unseen"}
    assert {path.stem for path in (EXPERIMENTS / "method").glob("*.yaml")} == {*METHODS}


def words(name: str, method: str = "tre_p") -> list[str]:
    files = (EXPERIMENTS / f"{name}.yaml", EXPERIMENTS / "method" / f"{method}.yaml")
    return ["fit", *itertools.chain.from_iterable(("--config", str(file)) for file in files)]


def check_method(method: str, config: Any) -> None:
    """The method's callbacks, and the clipping."""
    found = [
        (spec["class_path"].rpartition(".")[2], {**spec["init_args"]})
        for spec in runs.value_at(config, "trainer.callbacks")
    ]
    assert [name for name, _ in found] == [name for name, _ in METHODS[method]]
    for (_, options), (_, facts) in zip(found, METHODS[method], strict=True):
        assert {key: options[key] for key in facts} == facts
    ppo = runs.value_at(config, "model.ppo")
    assert {key: ppo[key] for key in CLIPPED} == CLIPPED


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_experiment_with_every_method(name: str, method: str) -> None:
    """All that the files say; the test below has the defaults behind them."""
    alone = runs.merged(EXPERIMENTS / f"{name}.yaml")
    config = runs.merged(EXPERIMENTS / f"{name}.yaml", EXPERIMENTS / "method" / f"{method}.yaml")
    check_method(method, config)
    for key, fact in {**SHARED, **PUBLISHED[name]}.items():
        with contextlib.suppress(KeyError):  # a default
            assert runs.value_at(config, key) == fact, key
    alone["trainer"].pop("callbacks", None)
    config["trainer"].pop("callbacks", None)
    assert config == alone  # a method changes nothing else


@pytest.mark.parametrize(
    ("name", "method"), list(zip(PUBLISHED, METHODS, strict=True)), ids=lambda word: str(word)
)
def test_the_settings_are_those_published(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building the run asks for nothing of the hub."""
    monkeypatch.setattr(PPOCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = main([*words(name, method), "--trainer.accelerator=cpu"])
    assert isinstance(cli, PPOCLI)
    found = {key: cli.options.get(key, "none") for key in {**SHARED, **PUBLISHED[name]}}
    assert found == {**SHARED, **PUBLISHED[name]}
    check_method(method, cli.options)
    assert cli.run_dir == f"runs/{name}"
    built = [type(found).__name__ for found in find_methods(cli.trainer.callbacks)]
    assert built == [kind for kind, _ in METHODS[method]]
    iterations, between_validations = LENGTHS[name]
    assert cli.datamodule.iterations_per_epoch == between_validations
    assert cli.trainer.check_val_every_n_epoch == 1
    monkeypatch.setattr(Trainer, "num_training_batches", between_validations)
    monkeypatch.setattr(Trainer, "lightning_module", cli.model)
    assert total_batches(cli.trainer) == iterations
    optim, warmup = cli.model.optim_args, {420: 21, 406: 20, 2800: 140}[iterations]
    rates = [optim.rates(i, iterations) for i in range(iterations)]
    assert {policy for policy, _ in rates} == {1e-6}
    assert [critic for _, critic in rates] == pytest.approx(
        [1e-5 * min(i / warmup, 1.0) for i in range(1, iterations + 1)]
    )


def test_the_variant_without_the_leak_is_the_same_but_for_the_reward_model() -> None:
    for size in ("1.5b", "7b"):
        ours = runs.merged(EXPERIMENTS / f"hh_{size}_unseen.yaml")
        theirs = runs.merged(EXPERIMENTS / f"hh_{size}.yaml")
        assert ours["data"]["init_args"]["reward"]["model"] == f"runs/hh_reward_{size}_unseen/model"
        sizes = [ours["data"]["init_args"][f"{stage}_size"] for stage in ("train", "test")]
        seed = ours["data"]["init_args"]["shuffle_seed"]
        for config in (ours, theirs):
            del config["data"]["init_args"]["reward"]["model"]
            del config["trainer"]["default_root_dir"]
        assert ours == theirs
        model, leaking = (
            runs.merged(REWARD / f"hh_{size}{unseen}.yaml") for unseen in ("_unseen", "")
        )
        assert model["trainer"].pop("default_root_dir") == f"runs/hh_reward_{size}_unseen"
        assert leaking["trainer"].pop("default_root_dir") == f"runs/hh_reward_{size}"
        data = model["data"]["init_args"]
        assert (data.pop("shuffle_seed"), data.pop("skip_rows")) == (seed, sum(sizes))
        assert model == leaking


@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_the_reward_model_is_the_authors(size: str) -> None:
    config = runs.merged(REWARD / f"hh_{size}.yaml")
    facts = {
        "model.policy.model": f"Qwen/Qwen2.5-{size.upper()}-Instruct",
        "model.lr": 1e-5,
        "model.warmup_fraction": 0.1,
        "model.final_lr_fraction": 0.0,
        "model.centering_coef": 1e-2,
        "data.init_args.source": "trl-lib/ultrafeedback_binarized",
        "data.init_args.split": "train",
        "trainer.max_epochs": 3,
        "trainer.precision": "bf16-mixed",
        "trainer.gradient_clip_val": 1.0,
    }
    assert {key: runs.value_at(config, key) for key in facts} == facts
    together = config["trainer"]["accumulate_grad_batches"]
    assert config["data"]["init_args"]["batch_size"] * together == 512


def test_the_rows_of_the_hub_are_split_as_in_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the order of the rows, MATH by the splits of its dataset."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(PPOCLI, "_run_subcommand", lambda self, subcommand: None)
    asked = []

    def load(name: str, split: str) -> Iterable[dict[str, Any]]:
        asked.append((name, split))
        if "MATH" in name:
            return iter([{"problem": f"{split}?", "level": "1", "solution": r"\boxed{1}"}])
        return ({"nums": [n, 1, 1], "target": n} for n in itertools.count(1))

    monkeypatch.setattr(datasets, "load_dataset", load)
    puzzles = main([*words("countdown_1.5b"), "--trainer.accelerator=cpu"]).datamodule
    for stage in ("test", "val"):
        held_out = [p.extra["target"] for p in puzzles.heldout_prompts(stage)[stage]]
        assert held_out == [*range(7501, 12501)]
    trained = [puzzles.train_prompt(index).extra["target"] for index in range(7500)]
    assert sorted(trained) == [*range(1, 7501)]
    assert asked == [("Jiayi-Pan/Countdown-Tasks-3to4-Unique", "train")]

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


@pytest.mark.parametrize(
    ("options", "policy", "critic"),
    [
        ({"warmup_iterations": 2}, [0.5, 1.0, 1.0, 1.0], [0.5, 1.0, 1.0, 1.0]),
        ({"critic_warmup_iterations": 4}, [1.0] * 4, [0.25, 0.5, 0.75, 1.0]),
        ({"critic_warmup_fraction": 0.5}, [1.0] * 4, [0.25, 0.5, 0.75, 1.0]),
        ({"warmup_fraction": 0.25, "critic_warmup_fraction": 0.0}, [0.5, 1.0, 1.0, 1.0], [1.0] * 4),
        (
            {"warmup_iterations": 2, "critic_warmup_fraction": 0.5},
            [0.5, 1.0, 1.0, 1.0],
            [0.25, 0.5, 0.75, 1.0],
        ),
    ],
)
def test_the_critic_may_warm_up_otherwise_than_the_policy(
    options: dict[str, Any], policy: list[float], critic: list[float]
) -> None:
    optim = OptimArgs(lr=2.0, critic_lr=3.0, **options)
    rates = [optim.rates(i, 8) for i in range(4)]
    assert [rate / 2.0 for rate, _ in rates] == pytest.approx(policy)
    assert [rate / 3.0 for _, rate in rates] == pytest.approx(critic)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"critic_warmup_fraction": 1.5}, r"model\.optim\.critic_warmup_fraction=1\.5 must lie"),
        ({"critic_warmup_iterations": -1}, r"model\.optim\.critic_warmup_iterations=-1 must be"),
        (
            {"critic_warmup_iterations": 2, "critic_warmup_fraction": 0.1},
            r"critic_warmup_iterations=2 or model\.optim\.critic_warmup_fraction=0\.1, not both",
        ),
    ],
)
def test_a_warm_up_of_the_critic_that_cannot_be(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        OptimArgs(**options)
    with pytest.raises(ValueError, match=r"critic_warmup_fraction=0\.1 needs a run with an end"):
        OptimArgs(critic_warmup_fraction=0.1).check_end(known=False)


def test_the_rate_of_a_reward_model_rises_and_falls() -> None:
    trainer: Any = SimpleNamespace(max_epochs=1, max_steps=-1, estimated_stepping_batches=6)
    found = decaying_adamw(torch.nn.Linear(1, 1), trainer, 2.0, 0.0, warmup_fraction=1 / 3)
    schedule: Any = found["lr_scheduler"]["scheduler"]  # type: ignore[index,typeddict-item]
    rates = []
    for _ in range(6):
        rates += schedule.get_last_lr()
        schedule.optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0, 2.0, 2.0, 4 / 3, 2 / 3, 0.0])


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
    },
    "hh": {
        "train_file": "{hh}",
        "train_size": "4",
        "test_size": "1",
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
    assert logged["value/lr"] == [(0, pytest.approx(1e-5))]  # 0.05 of one iteration is none
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
