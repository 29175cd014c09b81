"""Whole runs of the command line: what they write, and what must not change their result."""

import itertools
import json
import math
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import runs
from tre_lightning.cli.main import main
from tre_lightning.tasks import CountdownDataModule, PuzzleSpec

ENTROPY = {"class_path": "tre_lightning.methods.EntropyBonus", "init_args": {"coef": 0.02}}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run and what it printed; tests only read it."""
    run_dir = tmp_path_factory.mktemp("done") / "run"
    eval_file = run_dir.with_name("eval.jsonl")
    eval_file.write_text('{"nums": [2, 3], "target": 5}\n{"nums": [4, 5], "target": 20}\n')
    printed = runs.output_of(run_dir, changes={"data.init_args.eval_file": str(eval_file)})
    return run_dir, printed


# ----- what a run writes


def test_checkpoints_hold_tensors_and_counts_only(done: tuple[Path, str]) -> None:
    run_dir, _ = done
    last = runs.checkpoint(run_dir)  # torch.load(weights_only=True)
    assert last["tre_lightning"]["iteration"] == runs.ITERATIONS
    assert last["global_step"] == runs.ITERATIONS * runs.STEPS_AN_ITERATION
    scores = dict(runs.scalars(run_dir)["val/pass@1"])
    best = runs.checkpoint(run_dir, "best")
    trained = {step: score for step, score in scores.items() if step > 0}
    assert best["tre_lightning"]["iteration"] == 1 + max(trained, key=lambda step: trained[step])
    names = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_each_step_is_logged_once(done: tuple[Path, str]) -> None:
    scalars = runs.scalars(done[0])
    iterations = list(range(runs.ITERATIONS))
    for tag in ("rollout/score", "entropy/full", "policy/approx_kl", "loss/tre", "value/mean"):
        assert [step for step, _ in scalars[tag]] == iterations, tag
    # Before training, and after the epochs of iterations 0, 1 and 2, 3.
    for split in ("val", "val_file"):
        for tag in ("pass@1", "majority@2"):
            assert [step for step, _ in scalars[f"{split}/{tag}"]] == [0, 1, 3]
    assert not [tag for tag in scalars if tag.endswith("_se")]  # the test's alone
    assert "rollout/scorer_timeouts" not in scalars  # this scorer has no time-out
    assert all(math.isfinite(value) for events in scalars.values() for _, value in events)


def test_the_policy_learns(tmp_path: Path) -> None:
    runs.run(tmp_path / "run", "--data.init_args.batch_size=16", "--trainer.max_epochs=6")
    scalars = runs.scalars(tmp_path / "run")
    scores = [score for _, score in scalars["rollout/score"]]
    assert sum(scores[:2]) / 2 + 0.3 < sum(scores[-2:]) / 2
    assert scalars["val/score"][0][1] + 0.3 < scalars["val/score"][-1][1]


def test_samples_are_logged_as_text(done: tuple[Path, str]) -> None:
    samples = runs.texts(done[0], "val/samples")
    assert len(samples) == 3
    spec = PuzzleSpec((2, 3), (1, 9), (1, 30), max_intermediate=30)
    task = CountdownDataModule(puzzles=spec, instruct=False, val_size=2)
    prompts = task.heldout_prompts("val")["val"]
    for _, text in samples:
        assert text.count("score ") == 2  # evaluation.num_samples_logged
        assert prompts[0].text in text and prompts[1].text in text
    assert len({text for _, text in samples}) > 1  # of the policy as it changes


def test_closing_table_compares_before_and_after(done: tuple[Path, str]) -> None:
    run_dir, printed = done
    scalars = runs.scalars(run_dir)
    for tag in ("val/pass@1", "val/pass@2", "val_file/pass@1", "val_file/pass@2"):
        row = next(line for line in printed.splitlines() if f" {tag} " in line)
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        before, after = scalars[tag][0][1], scalars[tag][-1][1]
        assert cells == [tag, f"{before:.3f}", f"{after:.3f}"]
    assert f"tensorboard --logdir {run_dir}" in printed


def test_exported_model_is_the_trained_policy(done: tuple[Path, str]) -> None:
    run_dir, _ = done
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    trained = runs.weights(run_dir)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, trained[f"actor_critic.policy.{name}"]), name
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    text = "3 6 2 = 11 : 3 * 6"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_saved_configuration_repeats_the_run(done: tuple[Path, str], tmp_path: Path) -> None:
    run_dir, _ = done
    other = tmp_path / "other"
    main(["fit", "--config", f"{run_dir}/config.yaml", f"--trainer.default_root_dir={other}"])
    assert runs.distance(runs.weights(run_dir), runs.weights(other)) == 0.0
    assert runs.scalars(run_dir) == runs.scalars(other)


# ----- the other commands


def test_validate_test_and_predict_from_a_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    curves = runs.scalars(run_dir)
    ckpt = f"--ckpt_path={run_dir}/checkpoints/last.ckpt"

    scores = runs.run(run_dir, "--ckpt_path=last", command="validate").trainer.callback_metrics
    assert float(scores["val/score"]) == curves["val/score"][-1][1]
    scores = runs.run(run_dir, ckpt, command="test").trainer.callback_metrics
    assert 0.0 <= float(scores["test/pass@1"]) <= float(scores["test/pass@2"]) <= 1.0
    errors = {tag: float(value) for tag, value in scores.items() if tag.endswith("_se")}
    runs.run(run_dir, ckpt, command="predict")

    assert capsys.readouterr().out.endswith(f"predictions  {run_dir}/predictions.jsonl\n")
    records = [json.loads(line) for line in (run_dir / "predictions.jsonl").open()]
    assert len(records) == 5  # test_size
    for record in records:
        assert record["prompt"].endswith(":")
        plus = [float("+" in response.split()) for response in record["responses"]]
        assert len(plus) == 2 and record["scores"] == plus
    both = [record["scores"] for record in records]
    votes = [[bool(response.split()) for response in record["responses"]] for record in records]
    # Two answers agree, or tie: the mean of those that there are.
    majority = [
        sum(s for s, v in zip(*pair, strict=True) if v) / max(sum(pair[1]), 1)
        for pair in zip(both, votes, strict=True)
    ]
    by_prompt = {
        "test/score": [sum(pair) / 2 for pair in both],
        "test/pass@1": [sum(pair) / 2 for pair in both],
        "test/pass@2": [max(pair) for pair in both],
        "test/majority@2": majority,
    }
    for tag, values in by_prompt.items():
        assert float(scores[tag]) == pytest.approx(sum(values) / 5), tag
        assert errors[f"{tag}_se"] == pytest.approx(statistics.stdev(values) / 5**0.5), tag
    textless = re.compile("<(unused|pad|unk)")
    responses = [response for record in records for response in record["responses"]]
    share = sum(bool(textless.search(response)) for response in responses) / len(responses)
    assert not any("<eos>" in response for response in responses)  # it ends a response
    assert 0.0 < share < 1.0 and float(scores["test/invalid_fraction"]) == pytest.approx(share)
    assert errors.keys() == {f"{tag}_se" for tag in by_prompt} | {"test/response_length_se"}
    assert runs.scalars(run_dir) == curves  # the curves of the training are as they were


def test_commands_without_a_checkpoint_take_the_warm_start(finished: Path, tmp_path: Path) -> None:
    scores = runs.run(tmp_path / "run", command="validate").trainer.callback_metrics
    assert float(scores["val/score"]) == runs.scalars(finished)["val/score"][0][1]


def test_sft_alone_trains_a_model(tmp_path: Path, refusal: runs.Said) -> None:
    config = {
        "model": {
            "policy": {"architecture": runs.ARCHITECTURE},
            "output_dir": str(tmp_path / "model"),
            "lr": 0.02,
        },
        "data": {
            "class_path": "tre_lightning.tasks.Demonstrations",
            "init_args": {"task": runs.TINY["data"], "steps": 5, "batch_size": 8},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "default_root_dir": str(tmp_path / "run"),
            "enable_checkpointing": False,
        },
    }
    file = tmp_path / "sft.json"
    file.write_text(json.dumps(config))
    main(["sft", "fit", "--config", str(file)])
    losses = [loss for _, loss in runs.scalars(tmp_path / "run")["sft/loss"]]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == 48
    # The model is there: refuse before the training, not after.
    assert "model.output_dir" in refusal(main, ["sft", "fit", "--config", str(file)])


def test_warm_start_is_trained_once_for_its_options(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def folders(name: str, *flags: str) -> dict[str, int]:
        flags = (f"--warm_start.cache_dir={cache}", "--trainer.max_epochs=1", *flags)
        runs.run(tmp_path / name, *flags)
        return {d.name: (d / "model" / "config.json").stat().st_mtime_ns for d in cache.iterdir()}

    first = folders("first")
    assert len(first) == 1
    assert folders("same") == first
    assert (
        folders("same_task", "--data.init_args.batch_size=5", "--model.ppo.num_epochs=1") == first
    )
    longer = folders("longer", "--warm_start.steps=4")
    assert len(longer) == 2 and first.items() <= longer.items()
    assert len(folders("seed", "--seed_everything=1")) == 3
    assert len(folders("task", "--data.init_args.format=answer")) == 4


# ----- variants


def test_shared_critic(tmp_path: Path) -> None:
    runs.run(tmp_path / "run", "--model.policy.critic=shared")
    trained = runs.weights(tmp_path / "run")
    assert not [name for name in trained if name.startswith("actor_critic.critic.")]
    assert trained["actor_critic.value_head.weight"].abs().max() > 0  # starts at zero
    assert [step for step, _ in runs.scalars(tmp_path / "run")["loss/value"]] == [0, 1, 2, 3]


def without_critic(estimator: str) -> dict[str, Any]:
    without = {"model.policy.critic": "none", "model.ppo.estimator": estimator}
    return {**without, "checkpoint": {"keep_all": True}}


@pytest.fixture(scope="module")
def critic_free(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each estimator; tests only read them."""
    root = tmp_path_factory.mktemp("critic_free")
    for estimator in ("grpo", "rloo", "reinforce_pp"):
        runs.run(root / estimator, changes=without_critic(estimator))
    return {run_dir.name: run_dir for run_dir in root.iterdir() if run_dir.is_dir()}


def test_each_estimator_trains_another_policy(critic_free: dict[str, Path]) -> None:
    for left, right in itertools.combinations(critic_free.values(), 2):
        assert runs.distance(runs.weights(left), runs.weights(right)) > 1e-4


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_pp"])
def test_without_a_critic(
    estimator: str, critic_free: dict[str, Path], finished: Path, tmp_path: Path
) -> None:
    whole, run_dir, changes = critic_free[estimator], tmp_path / "run", without_critic(estimator)
    trained, with_critic = runs.weights(whole), runs.weights(finished)
    policy = "actor_critic.policy."
    assert trained.keys() == {name for name in with_critic if name.startswith(policy)}
    start = AutoModelForCausalLM.from_pretrained(next(runs.WARM_STARTS.iterdir()) / "model")
    at_start = {policy + name: weight for name, weight in start.state_dict().items()}
    assert runs.distance(trained, at_start) > 1e-3
    assert runs.distance(trained, {name: with_critic[name] for name in trained}) > 1e-3
    scalars, others = runs.scalars(whole), runs.scalars(finished)
    of_critic = {"loss/value", *(tag for tag in others if tag.startswith("value/"))}
    assert len(of_critic) == 6
    of_critic.add("policy/evaluation_padding_fraction")  # the sampler tells the rest
    assert scalars.keys() == others.keys() - of_critic
    assert all(math.isfinite(value) for events in scalars.values() for _, value in events)
    grad_norms = [value for _, value in scalars["policy/grad_norm"]]
    assert len(grad_norms) == runs.ITERATIONS and max(grad_norms) > 1e-2
    for i, total in scalars["loss/total"]:
        parts = (dict(scalars[f"loss/{name}"])[i] for name in ("policy", "tre"))
        assert total == pytest.approx(sum(parts), abs=1e-6)
    # An optimiser without a group for the critic goes on from the checkpoint.
    shutil.copytree(whole, run_dir)
    runs.resume(run_dir, f"{run_dir}/checkpoints/iteration=2.ckpt", changes=changes)
    assert runs.distance(runs.weights(run_dir), trained) == 0.0
    assert runs.scalars(run_dir) == scalars
    scores = runs.run(run_dir, "--ckpt_path=last", command="validate", changes=changes)
    assert float(scores.trainer.callback_metrics["val/score"]) == scalars["val/score"][-1][1]


def test_kl_to_the_initial_policy(finished: Path, tmp_path: Path) -> None:
    runs.run(tmp_path / "run", "--model.ppo.kl_coef=0.5")
    kl = [value for _, value in runs.scalars(tmp_path / "run")["rollout/ref_kl"]]
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and min(kl[1:]) > 1e-4
    trained = runs.weights(tmp_path / "run")
    assert trained.keys() == runs.weights(finished).keys()  # no checkpoint holds the reference
    assert runs.distance(trained, runs.weights(finished)) > 0  # it is in the reward
    assert "rollout/ref_kl" not in runs.scalars(finished)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)]
)
def test_low_precision(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    runs.run(tmp_path / "run", f"--trainer.precision={precision}")
    assert {weight.dtype for weight in runs.weights(tmp_path / "run").values()} == {dtype}
    scalars = runs.scalars(tmp_path / "run")
    for tag in ("loss/total", "policy/approx_kl", "entropy/full", "policy/grad_norm"):
        assert [step for step, _ in scalars[tag]] == [0, 1, 2, 3], tag  # NaN is left out
        assert all(math.isfinite(value) for _, value in scalars[tag]), tag


# ----- what must not change the result


def test_only_another_seed_changes_the_result(finished: Path, tmp_path: Path) -> None:
    runs.run(tmp_path / "same")
    assert runs.distance(runs.weights(tmp_path / "same"), runs.weights(finished)) == 0.0
    assert runs.scalars(tmp_path / "same") == runs.scalars(finished)
    # The same warm start, but other prompts, samples and minibatches.
    model = next(runs.WARM_STARTS.iterdir()) / "model"
    changes = {"model.policy": {"model": str(model)}, "warm_start": None}
    for seed in (42, 7):
        runs.run(tmp_path / f"{seed}", f"--seed_everything={seed}", changes=changes)
    assert runs.distance(runs.weights(tmp_path / "42"), runs.weights(tmp_path / "7")) > 0.0


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("micro") / "whole"
    one_iteration(run_dir, 16)
    return run_dir


def one_iteration(run_dir: Path, micro_batch_size: int) -> None:
    runs.run(
        run_dir,
        f"--model.ppo.micro_batch_size={micro_batch_size}",
        "--model.ppo.num_minibatches=1",
        "--trainer.precision=64-true",
        "--trainer.max_epochs=1",
        "--data.init_args.iterations_per_epoch=1",
    )


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batch_size_does_not_change_the_update(
    size: int, whole_batch: Path, tmp_path: Path
) -> None:
    one_iteration(tmp_path / "run", size)
    whole, parts = runs.weights(whole_batch), runs.weights(tmp_path / "run")
    assert runs.distance(whole, parts) < runs.ROUNDING
    scalars = runs.scalars(whole_batch)
    assert 0.0 < scalars["rollout/finished_fraction"][0][1] < 1.0  # responses of unequal lengths
    runs.assert_close_curves(whole_batch, tmp_path / "run", rel=1e-6)


KL_LOSS = (
    "--model.ppo.kl_coef=0.5",
    "--model.ppo.kl_in=loss_weighted",
    "--model.ppo.kl_estimator=k3",
)


@pytest.mark.parametrize(
    "flags", [(), (*KL_LOSS, "--model.policy.critic=shared")], ids=["", "kl-shared"]
)
@pytest.mark.parametrize(("precision", "close"), [("64-true", 1e-6), ("32-true", 2e-3)])
def test_the_fused_ops_change_nothing(
    precision: str, close: float, flags: tuple[str, ...], tmp_path: Path
) -> None:
    # 16 updates, with values and advantages in float32. AdamW would make a whole step of the sign
    # of a gradient that is all but 0, hence the eps.
    logits = {"class_path": "runs.NeedsLogits", "init_args": {"coef": 0.02}}
    ways = {
        "fused": ("--model.ppo.fused=true", ENTROPY),
        "reference": ("--model.ppo.fused=false", ENTROPY),
        "logits": ("--model.ppo.fused=true", logits),
    }
    for way, (flag, bonus) in ways.items():
        changes = {"trainer.callbacks": [runs.TRE, bonus]}
        precise = f"--trainer.precision={precision}"
        runs.run(tmp_path / way, flag, precise, "--model.optim.eps=1e-4", *flags, changes=changes)
    expected = runs.weights(tmp_path / "fused")
    for way in ("reference", "logits"):
        assert 0.0 < runs.distance(runs.weights(tmp_path / way), expected) < close
        runs.assert_close_curves(tmp_path / "fused", tmp_path / way, rel=close, abs=close)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield
