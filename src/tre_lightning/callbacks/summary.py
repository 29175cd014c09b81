"""The closing table of a run, its export, and predictions as JSONL."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table

from tre_lightning.callbacks.model_card import describe, hub_name, model_card
from tre_lightning.common.memory import peak_memory
from tre_lightning.methods import find_methods
from tre_lightning.training.ppo import PPOModule


class RunSummary(Callback):
    """Prints the scores before and after training, and exports the policy."""

    def __init__(self, export: bool = True) -> None:
        """Keep the options.

        Args:
            export: write the policy into ``model`` in the run directory, for transformers.
        """
        self.export = export
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.validated = 0  # iterations before the last validation
        self.seconds = 0.0
        self.tokens = 0.0  # sampled in training, over all devices
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the scores: the first ones (from before training) and the latest."""
        if trainer.sanity_checking:
            return
        self.validated = cast(int, pl_module.iteration)
        values = {tag: float(value) for tag, value in trainer.callback_metrics.items()}
        passed = {tag: v for tag, v in values.items() if tag.startswith("val") and "pass@" in tag}
        scores = {tag: v for tag, v in values.items() if re.fullmatch(r"val\w*/score", tag)}
        self.after = passed or scores  # a task without right and wrong has no pass@k
        self.before = self.before or self.after

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens of the iteration that has just ended."""
        responses = batch.total_rows * cast(PPOModule, pl_module).rollout_args.num_responses
        self.tokens += float(trainer.callback_metrics["rollout/response_length"]) * responses

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and export the policy."""
        self.seconds += time.perf_counter() - self._started
        if not self.export or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module = cast(PPOModule, pl_module)
        directory = self.model_dir(trainer)
        module.actor_critic.save_pretrained(directory, module.tokenizer)
        if trainer.is_global_zero:
            (directory / "README.md").write_text(self._card(trainer, module), encoding="utf-8")

    def _card(self, trainer: Trainer, module: PPOModule) -> str:
        config = Path(trainer.default_root_dir) / "config.yaml"
        policy = module.policy_args
        methods = find_methods(trainer.callbacks)  # type: ignore[attr-defined]
        return model_card(
            base_model=hub_name(policy.model),
            task=type(trainer.datamodule).__name__,  # type: ignore[attr-defined]
            methods=[describe(method) for method in methods],
            adapters=None if policy.lora is None else f"LoRA of rank {policy.lora.rank}",
            iterations=module.iteration,
            seed=module.seed,
            before=self.before,
            after=self.after,
            config=config.read_text(encoding="utf-8") if config.exists() else "",
        )

    def state_dict(self) -> dict[str, Any]:
        """The scores, and the seconds and tokens so far."""
        running = time.perf_counter() - self._started
        return {
            "before": self.before,
            "after": self.after,
            "seconds": self.seconds + running,
            "tokens": self.tokens,
            "validated": self.validated,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what the resumed run has counted."""
        self.before = state_dict["before"]
        self.after = state_dict["after"]
        self.seconds = state_dict["seconds"]
        self.tokens = state_dict.get("tokens", 0.0)
        self.validated = state_dict.get("validated", 0)

    @staticmethod
    def model_dir(trainer: Trainer) -> Path:
        """Where the policy is exported."""
        return Path(trainer.default_root_dir) / "model"

    def print_table(self, trainer: Trainer, warm_start_seconds: float | None) -> None:
        """Print the scores before and after, where the files are, and how to view them."""
        module = cast(PPOModule, trainer.lightning_module)
        last = self.validated == module.iteration  # else the run ended before a validation
        after = "after" if last else f"after iteration {self.validated} of {module.iteration}"
        table = Table("held-out prompts", "before", after)
        for tag, score in self.after.items():
            before = self.before.get(tag)
            table.add_row(tag, "" if before is None else f"{before:.3f}", f"{score:.3f}")
        console = Console()
        if self.after:
            console.print(table)
        trained = f"trained {self.seconds:.0f} s"
        if warm_start_seconds is not None:
            trained += f" after a warm start of {warm_start_seconds:.0f} s"
        speed = self.tokens / max(self.seconds, 1e-9)
        trained += f"\ncost         {speed:.0f} response tokens/s, peak memory {_peak_memory()}"
        run_dir = trainer.default_root_dir
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            nothing = f"{trained}\ntrainer.fast_dev_run: nothing was kept"
            return console.print(nothing, soft_wrap=True, highlight=False)
        console.print(f"{trained}\nlogs         {run_dir}", soft_wrap=True, highlight=False)
        if not trainer.checkpoint_callbacks:
            console.print("checkpoints  none (trainer.enable_checkpointing=false)", soft_wrap=True)
        if self.export:
            console.print(
                f"model        {self.model_dir(trainer)}", soft_wrap=True, highlight=False
            )
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            console.print(
                f"look at it   tensorboard --logdir {run_dir}", soft_wrap=True, highlight=False
            )


def _peak_memory() -> str:
    """The most that this process has held at a time, and its GPU."""
    text = f"{peak_memory() / 1e9:.1f} GB"
    if torch.cuda.is_available():
        text += f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the GPU"
    return text


class PredictionWriter(BasePredictionWriter):
    """Writes the records of ``predict`` to ``predictions.jsonl`` in the run directory."""

    def __init__(self) -> None:
        super().__init__("batch")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start with an empty file."""
        if stage == "predict" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self.path(trainer)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Sequence[dict[str, Any]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the records of a batch."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with self.path(trainer).open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print where the predictions are."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            print(f"predictions  {self.path(trainer)}")

    @staticmethod
    def path(trainer: Trainer) -> Path:
        """The file of this rank."""
        name = "predictions.jsonl"
        if trainer.world_size > 1:
            name = f"predictions-{trainer.global_rank}.jsonl"
        return Path(trainer.default_root_dir) / name
