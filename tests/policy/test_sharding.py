"""Weights sharded over two processes, or over two nodes: the numbers are those of one process."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import runs
from tre_lightning.batches import Rollout
from tre_lightning.cli.main import main
from tre_lightning.methods import PolicyOutputs, Tokens
from tre_lightning.policy import sharding
from tre_lightning.policy.actor_critic import ActorCritic, PolicyArgs, trains_all
from tre_lightning.policy.head import HeadOptions
from tre_lightning.policy.sharding import check_sharding

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)

TIMEOUT = 240.0  # seconds; a deadlock must fail, not hang

SHARDED = yaml.safe_load((runs.CONFIGS / "scale" / "8gpu.yaml").read_text())["trainer"]["strategy"]
PPO = {"num_epochs": 2, "num_minibatches": 3, "micro_batch_size": 3}
# 2 prompts on one process and 3 on the other: 8 and 12 responses, 3 and 4 micro-batches of them.
CHANGES: dict[str, Any] = {
    "data.init_args.batch_size": 5,
    "data.init_args.eval_batch_size": 8,  # one batch, however many processes
    "model.ppo": {**PPO, "kl_coef": 0.1, "kl_in": "loss", "kl_estimator": "k3"},
    "checkpoint": {"keep_all": True},
    # Lightning refuses trainer.precision 64-true with this strategy; the plugin is the same.
    "trainer.plugins": [{"class_path": "lightning.pytorch.plugins.DoublePrecision"}],
}
# No critic; the head's weight is the embedding's, so two modules share one of the sharded weights.
GRPO = {
    **CHANGES,
    "model.ppo": {**PPO, "estimator": "grpo", "old_logprobs": "recompute"},
    "model.policy.critic": "none",
    "model.policy.gradient_checkpointing": True,
    "model.policy.architecture": {
        **runs.ARCHITECTURE,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
    },
}


def run_sharded(
    run_dir: Path,
    *flags: str,
    changes: Mapping[str, Any] = CHANGES,
    command: str = "fit",
    code: int = 0,
) -> str:
    """Run a command on two processes; what it prints before the first exits with ``code``."""
    changes = {**changes, "trainer.strategy": SHARDED}
    words = runs.words(run_dir, *flags, "--trainer.devices=2", command=command, changes=changes)
    codes, printed = runs.command_on_ranks(words)
    assert codes == [code, 0], printed[-3000:]
    return printed


def assert_same(left: Path, right: Path) -> None:
    """Weights after every iteration, curves and exported models of two runs are equal."""
    for i in range(1, runs.ITERATIONS + 1):
        weights = runs.weights(left, f"iteration={i}")
        assert runs.distance(weights, runs.weights(right, f"iteration={i}")) < runs.ROUNDING
    runs.assert_close_curves(left, right)
    exported = [load_file(run / "model" / "model.safetensors") for run in (left, right)]
    assert runs.distance(*exported) < runs.ROUNDING


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process; tests only read it."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    runs.run(run_dir, changes=CHANGES)
    return run_dir


@pytest.fixture(scope="module")
def together(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two; tests only read it. The warm start is there."""
    run_dir = tmp_path_factory.mktemp("together") / "run"
    printed = run_sharded(run_dir)
    assert printed.count("held-out prompts") == 1  # one table, by the first process
    return run_dir


def test_separate_critic_and_reference(alone: Path, together: Path) -> None:
    assert runs.scalars(alone)["rollout/ref_kl"][-1][1] > 1e-6  # the reference is another model
    assert_same(alone, together)
    weights = runs.weights(alone)
    assert any(name.startswith("actor_critic.critic.") for name in weights)


def test_no_critic_and_tied_embeddings(tmp_path: Path) -> None:
    runs.run(tmp_path / "one", changes=GRPO)
    run_sharded(tmp_path / "two", changes=GRPO)
    assert_same(tmp_path / "one", tmp_path / "two")


@contextmanager
def cut_short(run: Path, run_dir: Path) -> Iterator[str]:
    """A copy of a run as it was after iteration 2, and the flag that goes on with it."""
    shutil.copytree(run, run_dir)
    shutil.rmtree(run_dir / "model")
    yield f"--ckpt_path={run_dir}/checkpoints/iteration=2.ckpt"
    assert runs.saved_iteration(run_dir) == runs.ITERATIONS


def assert_same_end(left: Path, right: Path) -> None:
    """Weights and AdamW's moments at the end of two runs are equal."""
    assert runs.distance(runs.weights(left), runs.weights(right)) < runs.ROUNDING
    moments = [runs.checkpoint(run)["optimizer_states"][0]["state"] for run in (left, right)]
    assert moments[0].keys() == moments[1].keys()
    for number, moment in moments[0].items():
        assert runs.distance(moment, moments[1][number]) < runs.ROUNDING


def test_saved_on_two_loaded_on_one(alone: Path, together: Path, tmp_path: Path) -> None:
    with cut_short(together, tmp_path / "run") as flag:
        runs.run(tmp_path / "run", flag, changes=CHANGES)
    assert_same_end(tmp_path / "run", alone)


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_saved_on_one_loaded_on_two(cpu_offload: bool, alone: Path, tmp_path: Path) -> None:
    changes = {**CHANGES, "model.policy.cpu_offload": cpu_offload}
    with cut_short(alone, tmp_path / "run") as flag:
        run_sharded(tmp_path / "run", flag, changes=changes)
    assert_same_end(tmp_path / "run", alone)


def test_predictions(alone: Path, together: Path, tmp_path: Path) -> None:
    flag = f"--ckpt_path={together}/checkpoints/last.ckpt"
    runs.run(tmp_path / "one", flag, command="predict", changes=CHANGES)
    run_sharded(tmp_path / "two", flag, command="predict")

    def records(file: Path) -> list[Any]:
        return [json.loads(line) for line in file.read_text().splitlines()]

    parts = [records(tmp_path / "two" / f"predictions-{rank}.jsonl") for rank in (0, 1)]
    expected = records(tmp_path / "one" / "predictions.jsonl")
    assert len(expected) == 5 and all(parts)
    assert sorted(map(str, parts[0] + parts[1])) == sorted(map(str, expected))


def test_the_layer_of_devices_keeps_float32_weights(alone: Path, tmp_path: Path) -> None:
    """Gathered in bfloat16; so small steps are not lost."""
    layer = ["--config", str(runs.CONFIGS / "scale" / "8gpu.yaml")]
    flags = [*layer, "--trainer.accelerator=cpu"]
    changes = {"data.init_args.batch_size": 5, "model.ppo": PPO, "trainer.max_epochs": 1}
    run_sharded(tmp_path / "run", *flags, changes=changes)
    weights = runs.weights(tmp_path / "run").values()
    assert all(weight.dtype == torch.float32 for weight in weights)
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights)


def test_all_ranks_skip_what_one_of_them_sees(alone: Path, tmp_path: Path) -> None:
    """A loss that is infinite on the second rank alone, and has no gradient."""
    poison = {"kind": "constant", "first": 1, "last": 100}
    changes = {
        **CHANGES,
        "model.ppo": {**PPO, "max_skipped_updates": 2},
        "trainer.callbacks": [{"class_path": "runs.Poison", "init_args": poison}],
    }
    printed = run_sharded(tmp_path / "run", changes=changes, code=1)
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "2 updates in a row" in lines[0], lines
    assert "not finite: loss/poison;" in lines[0]


# ----- two nodes


@contextmanager
def torchrun(words: list[str], node: int, port: int) -> Iterator["subprocess.Popen[str]"]:
    """One node of two, with one process, as torchrun starts it."""
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    where = [f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    with subprocess.Popen(
        [sys.executable, *launcher, *where, "-m", "tre_lightning", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": runs.python_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as node_process:
        try:
            yield node_process
        finally:
            if node_process.poll() is None:
                node_process.terminate()  # torchrun ends its process with itself


@pytest.mark.parametrize(
    "strategy",
    [pytest.param("ddp", id="ddp"), pytest.param(SHARDED, id="sharded", marks=pytest.mark.slow)],
)
def test_two_nodes(alone: Path, tmp_path: Path, strategy: Any) -> None:
    """``alone`` trained the warm start, and has the weights that two devices give."""
    run_dir = tmp_path / "run"
    changes = {**CHANGES, "trainer.strategy": strategy, "trainer.num_nodes": 2}
    words = runs.words(run_dir, changes=changes)
    port = runs.free_port()
    with ExitStack() as stack:
        nodes = [stack.enter_context(torchrun(words, node, port)) for node in (0, 1)]
        printed = [node.communicate(timeout=TIMEOUT)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed[0][-3000:] + printed[1][-3000:]
    assert_same(alone, run_dir)


# ----- what does not work is said before any work


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({}, "trainer.strategy.init_args.save_distributed_checkpoint=true"),
        (
            {"save_distributed_checkpoint": False, "tensor_parallel_size": 2},
            "trainer.strategy.init_args.tensor_parallel_size=2",
        ),
    ],
)
def test_options_of_the_strategy_that_are_refused(
    strategy: dict[str, Any], message: str, tmp_path: Path, refusal: runs.Said
) -> None:
    changes = {"trainer.strategy": {**SHARDED, "init_args": strategy}}
    assert message in refusal(runs.run, tmp_path / "run", changes=changes)


def test_adapters_are_refused(tmp_path: Path, refusal: runs.Said) -> None:
    changes = {"trainer.strategy": SHARDED, "model.policy.lora": {"rank": 2}}
    assert "model.policy.lora" in refusal(runs.run, tmp_path / "run", changes=changes)


def test_offload_needs_a_strategy_that_shards(tmp_path: Path, refusal: runs.Said) -> None:
    line = refusal(runs.run, tmp_path / "run", changes={"model.policy.cpu_offload": True})
    assert "model.policy.cpu_offload=true" in line and "configs/memory/cpu_offload.yaml" in line


@pytest.mark.parametrize("backend", [None, "nccl"])
def test_offload_needs_collectives_of_host_memory(backend: str | None) -> None:
    strategy = ModelParallelStrategy(
        save_distributed_checkpoint=False, process_group_backend=backend
    )
    strategy.parallel_devices = [torch.device("cuda", 0)]
    strategy.cluster_environment = LightningEnvironment()
    trainer = cast(Trainer, SimpleNamespace(strategy=strategy))
    with pytest.raises(ValueError, match=f"process_group_backend={backend} .*cpu:gloo,cuda:nccl"):
        check_sharding(trainer, adapters=False, cpu_offload=True)
    check_sharding(trainer, adapters=False, cpu_offload=False)
    strategy._process_group_backend = "cpu:gloo,cuda:nccl"
    check_sharding(trainer, adapters=False, cpu_offload=True)


def test_supervised_training_offloads_nothing() -> None:
    with pytest.raises(ValueError, match=r"model\.policy\.cpu_offload=true is for reinforcement"):
        trains_all(PolicyArgs(cpu_offload=True))


def test_supervised_training_is_not_sharded(tmp_path: Path, refusal: runs.Said) -> None:
    words = ["--config", str(runs.CONFIGS / "reward" / "hh_tiny.yaml")]
    strategy = tmp_path / "strategy.json"
    strategy.write_text(json.dumps({"trainer": {"strategy": SHARDED}}))
    words += ["--config", str(strategy), f"--model.output_dir={tmp_path}/model"]
    assert "trainer.strategy=ModelParallelStrategy shards" in refusal(
        main, ["reward", "fit", *words]
    )


# ----- what only shows on a GPU, where Lightning validates in inference mode


@contextmanager
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_offloaded_shards_stay_where_they_are(
    any_policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning moves the module to its device, here one that keeps no numbers."""
    places: list[object] = []

    def recorded(part: nn.Module, *, offload_policy: object, **options: Any) -> None:
        places.append(offload_policy)
        fully_shard(part, offload_policy=offload_policy, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sharding, "fully_shard", recorded)
    with one_process():
        model = ActorCritic(any_policy, None)
        model.shard("cpu", "32-true", cpu_offload=True)
        assert places and all(place == CPUOffloadPolicy(pin_memory=False) for place in places)
        held = [p.detach().full_tensor().clone() for p in model.parameters()]
        nn.ModuleList([model]).to("meta").to(torch.float64)
        for before, now in zip(held, model.parameters(), strict=True):
            assert now.device.type == "cpu" and now.dtype == torch.float64  # types still change
            assert torch.equal(now.detach().full_tensor(), before.double())


def test_sampling_in_inference_mode_spoils_no_later_update(any_policy: PreTrainedModel) -> None:
    with one_process():
        model = ActorCritic(any_policy, None)
        model.shard("cpu", "32-true")
        ids = torch.tensor([[2, 3, 4, 5]])
        with torch.inference_mode():
            logits = model.sample(lambda policy: policy(input_ids=ids).logits)
        assert logits.shape[:2] == (1, 4)
        assert all(isinstance(p, DTensor) for p in model.parameters())  # sharded again
        mask = torch.ones(1, 2, dtype=torch.bool)
        batch = Rollout(ids[:, :2], mask, ids[:, 2:], mask, mask[:, 0])
        asked = HeadOptions((), temperature=1.0, memory=2**20)
        loss, values = model.loss(batch, asked, lambda _, outputs: outputs.logprobs)
        assert values is not None
        (loss.total + values.sum()).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_half_precision_takes_no_digit_of_what_a_loss_is_given(any_policy: PreTrainedModel) -> None:
    """FSDP casts the arguments of a forward pass, tensors in records too."""
    old = torch.tensor([[1.0 + 2**-20]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    rows = torch.tensor([[2]])
    batch = Rollout(rows, mask, rows + 1, mask, mask[:, 0], behaviour_logprobs=old)
    tokens = Tokens(old[0], old[0], rows[0], {})
    seen: list[Tokens] = []

    @dataclass(frozen=True)
    class Objective:
        tokens: Tokens

        def __call__(self, rows: slice, outputs: PolicyOutputs) -> Tensor:
            seen.append(self.tokens[rows])
            return outputs.logprobs

    with one_process():
        model = ActorCritic(any_policy, None)
        model.shard("cpu", "bf16-mixed")
        asked = HeadOptions((), temperature=1.0, memory=2**20)
        loss, _ = model.loss(batch, asked, Objective(tokens))
        loss.total.backward()
    assert seen and all(torch.equal(part.old_logprobs, old[0]) for part in seen)
