"""TensorBoard views besides the curves: histograms, sample responses, hyperparameters."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from tre_lightning.batches import PromptBatch, Rollout
from tre_lightning.callbacks.checkpoint import has_run
from tre_lightning.callbacks.entropy_histograms import EntropyHistograms, add_histogram
from tre_lightning.callbacks.heat_map import Sample, heat_map
from tre_lightning.callbacks.hyperparameters import (
    add_hyperparameters,
    hyperparameters,
    result_tags,
)
from tre_lightning.callbacks.loggers import add_layout
from tre_lightning.training.ppo import PPOModule


class Inspection(Callback):
    """Writes histograms, samples, heat maps and hyperparameters; docs/metrics.md has every tag.

    The module's steps return what it needs. Histograms cover the rows of all devices, samples are
    those of the first one.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Group the curves, and write the hyperparameters once per run directory."""
        add_layout(trainer.loggers)
        wanted = trainer.enable_autolog_hparams
        if wanted and trainer.is_global_zero and not has_run(trainer.default_root_dir):
            module, name = cast(PPOModule, pl_module), str(trainer.default_root_dir)
            found, results = hyperparameters(module, trainer), result_tags(module, trainer)
            for writer in _writers(trainer):
                add_hyperparameters(writer, name, found, results)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
    ) -> None:
        """Write the histograms of the iteration that has just ended."""
        module, writers = cast(PPOModule, pl_module), _writers(trainer)
        if not writers or module.iteration % trainer.log_every_n_steps != 0:  # type: ignore[attr-defined]
            return
        found = outputs["entropies"]
        config = module.actor_critic.policy.config.get_text_config()
        histograms = EntropyHistograms(config.vocab_size, module.rollout_args.max_new_tokens)
        histograms = histograms.to(module.device)
        histograms.update(found, outputs["response_mask"])
        for tag, (heights, end) in histograms.compute().items():
            for writer in writers:
                add_histogram(writer, tag, heights, end, module.iteration - 1)
        for writer in writers:
            writer.flush()  # before the iteration's checkpoint: a kill in between would lose it

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the first responses to the first prompts of each set."""
        module, writers = cast(PPOModule, pl_module), _writers(trainer)
        shown = min(module.evaluation_args.num_samples_logged, len(batch))
        if batch_idx > 0 or shown == 0 or not writers:
            return
        rows = torch.arange(shown) * module.evaluation_args.num_responses
        scores = [float(outputs["scores"][row]) for row in rows]
        lines = [
            f"**{prompt}**  \n{outputs['texts'][row]}  \nscore {score:g}"
            for prompt, row, score in zip(batch.texts[:shown], rows, scores, strict=True)
        ]
        # All devices: with sharded weights each must take part.
        samples = _samples(trainer, module, batch, outputs["rollout"][rows], scores)
        if not trainer.is_global_zero:
            return
        config = module.actor_critic.policy.config
        picture = heat_map(samples, config.get_text_config().vocab_size)
        # The step at which Lightning logs this validation's scores.
        step = max(module.iteration - 1, 0)
        for writer in writers:
            writer.add_text(f"{batch.split}/samples", "\n\n".join(lines), step)
            writer.add_image(f"{batch.split}/heat_map", picture, step, dataformats="HWC")

    on_test_batch_end = on_validation_batch_end


def _writers(trainer: Trainer) -> list[SummaryWriter]:
    return [x.experiment for x in trainer.loggers if isinstance(x, TensorBoardLogger)]


def _samples(
    trainer: Trainer,
    module: PPOModule,
    batch: PromptBatch,
    rollout: Rollout,
    scores: Sequence[float],
) -> list[Sample]:
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        stats = module.entropies(rollout)
    samples = []
    titles = batch.questions or batch.texts
    for row, (prompt, score) in enumerate(zip(titles, scores, strict=False)):
        mask = rollout.response_mask[row]
        ids = rollout.response_ids[row][mask].tolist()
        samples.append(
            Sample(
                title=f"score {score:g}:  {prompt}",
                tokens=[str(module.tokenizer.decode([i])) or f"<{i}>" for i in ids],
                entropies=stats.full[row][mask].tolist(),
                sizes=[int(size) for size in stats.size[row][mask]],
            )
        )
    return samples
