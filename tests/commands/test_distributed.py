"""Two processes must train as one does: rollouts, advantages, updates and metrics are global."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import runs

TIMEOUT = 120.0  # seconds; a deadlock must fail, not hang

PPO = {"num_epochs": 2, "num_minibatches": 3, "micro_batch_size": 3}
CHANGES = {
    "data.init_args.batch_size": 5,  # 2 prompts on one process, 3 on the other
    "model.ppo": PPO,
    "checkpoint": {"keep_all": True},
}


# Whole groups of responses must meet on every process.
GRPO = {
    "model.policy.critic": "none",
    "model.ppo": {
        **PPO,
        "estimator": "grpo",
        "kl_coef": 0.1,
        "kl_in": "loss",
        "kl_estimator": "k3",
        "kl_target": 0.001,
        "kl_horizon": 50,
    },
}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("estimator", [{}, GRPO], ids=["gae", "grpo"])
def test_two_processes_train_as_one(tmp_path: Path, estimator: dict[str, Any]) -> None:
    precision = "--trainer.precision=64-true"
    changes = {**CHANGES, **estimator}
    runs.run(tmp_path / "one", precision, changes=changes)

    flags = ["--trainer.strategy=ddp", "--trainer.devices=2"]
    flags.append(f"--warm_start.cache_dir={tmp_path}/warm_starts")  # made by the first process only
    words = runs.words(tmp_path / "two", precision, *flags, changes=changes)
    if estimator:
        codes, printed = runs.command_on_ranks(words)
    else:  # once with Lightning's own launcher
        with runs.process(words, fresh=True) as process:
            printed, _ = process.communicate(timeout=TIMEOUT)
        codes = [process.returncode]
    assert not any(codes), printed[-3000:]

    for i in range(1, runs.ITERATIONS + 1):
        one = runs.weights(tmp_path / "one", f"iteration={i}")
        assert runs.distance(one, runs.weights(tmp_path / "two", f"iteration={i}")) < 1e-6
    runs.assert_close_curves(tmp_path / "one", tmp_path / "two")
    one, two = (
        EventAccumulator(str(tmp_path / name), {"histograms": 0}).Reload()
        for name in ("one", "two")
    )
    for tag in one.Tags()["histograms"]:  # of the rows of all processes
        for left, right in zip(one.Histograms(tag), two.Histograms(tag), strict=True):
            counts = left.histogram_value.bucket
            assert list(right.histogram_value.bucket) == pytest.approx(list(counts), abs=1e-6), tag
    assert printed.count("held-out prompts") == 1  # one table, by the first process
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()
