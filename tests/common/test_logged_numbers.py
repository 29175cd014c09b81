"""Whatever the precision of the weights, numbers that are logged or counted keep their digits."""

import csv
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

import runs
from tre_lightning.batches import PromptBatch, TrainingBatch
from tre_lightning.common.precision import float32_or_better
from tre_lightning.methods import EntropyBonus
from tre_lightning.training.diagnostics import RolloutMetrics, UpdateMetrics

SEEN: dict[str, torch.dtype] = {}


class Tenths(runs.PlusCountdown):
    """Scores that bfloat16 does not hold."""

    def score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
        return torch.tensor([0.1] * len(responses))


class Looks(EntropyBonus):
    """An entropy bonus that makes tensors in its hooks, and logs a number of its own."""

    def __init__(self) -> None:
        super().__init__(0.001, name="looks")

    def adapt(self, batch: TrainingBatch) -> None:
        SEEN.update(new=torch.tensor(0.1).dtype, scores=batch.scores.dtype)
        SEEN.update(advantages=batch.advantages.dtype)

    def logged(self) -> Mapping[str, float]:
        return {"count": 1_000_001.0}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The rows of a run in bfloat16."""
    run_dir = tmp_path_factory.mktemp("bf16") / "run"
    csv_logger = {
        "class_path": "tre_lightning.callbacks.loggers.CSV",
        "init_args": {"save_dir": str(run_dir)},
    }
    runs.run(
        run_dir,
        "--trainer.precision=bf16-true",
        "--trainer.max_epochs=1",
        changes={
            "data.class_path": "test_logged_numbers.Tenths",
            "trainer.callbacks": [{"class_path": "test_logged_numbers.Looks"}],
            "trainer.logger": [csv_logger],
            "model.optim": {"lr": 1e-5, "critic_lr": 3e-5},
            "summary": {"export": False},
        },
    )
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("policy/lr")]


def test_numbers_of_a_run_in_bfloat16(logged: list[dict[str, str]]) -> None:
    assert len(logged) == 2
    for row in logged:
        exact = {"policy/lr": 1e-5, "value/lr": 3e-5, "loss/looks_coef": 0.001}
        assert {tag: float(row[tag]) for tag in exact} == exact
        assert float(row["loss/looks_count"]) == 1_000_001.0
        assert float(row["rollout/score"]) == pytest.approx(0.1, rel=1e-7)


def test_tensors_of_a_step_in_bfloat16(logged: list[dict[str, str]]) -> None:
    del logged
    assert dict.fromkeys(("new", "scores", "advantages"), torch.float32) == SEEN


def test_no_number_of_a_run_is_rounded_to_bfloat16(logged: list[dict[str, str]]) -> None:
    """Means over tokens and steps; a few may hit a number of 8 bits by chance, zeros do."""
    numbers = [float(v) for row in logged for v in row.values() if v and float(v) == float(v)]
    broken = [x for x in numbers if x != int(x)]
    rounded = [x for x in broken if float(torch.tensor(x, dtype=torch.bfloat16)) == x]
    assert len(broken) > 30 and len(rounded) < len(broken) / 4


def test_metrics_count_on_in_a_module_of_bfloat16() -> None:
    rollout = RolloutMetrics(num_responses=2).to(torch.bfloat16)
    for count in (257, 1):
        rollout.update_timeouts(count)
    values = rollout.flush()
    assert values["rollout/scorer_timeouts"] == 258.0
    update = UpdateMetrics().to(torch.bfloat16)
    update["rollout/engine_ratio_max"].update(torch.tensor([1.001, float("nan")]))
    torch.set_default_dtype(torch.bfloat16)
    try:
        for _ in range(1000):
            update.add_loss("policy", torch.tensor(1.001, dtype=torch.float32))
            update.end_step(torch.tensor(1.001, dtype=torch.float32))
        for _ in range(257):
            update.skip_step()
        values = update.flush()
    finally:
        torch.set_default_dtype(torch.float32)
    assert values["rollout/engine_ratio_max"] == pytest.approx(1.001)
    assert values["loss/policy"] == pytest.approx(1.001)
    assert values["policy/grad_norm"] == pytest.approx(1.001)
    assert values["policy/skipped_updates"] == 257.0


@pytest.mark.parametrize(
    ("trainer", "step"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_new_tensors_are_float32_or_better(trainer: torch.dtype, step: torch.dtype) -> None:
    torch.set_default_dtype(trainer)
    try:
        with float32_or_better():
            assert torch.tensor(0.5).dtype == step
        assert torch.get_default_dtype() == trainer
    finally:
        torch.set_default_dtype(torch.float32)
