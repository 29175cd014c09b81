"""Training of a reward model on preference pairs, as a LightningModule."""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tre_lightning.common.errors import read
from tre_lightning.common.metrics import MaskedMean
from tre_lightning.common.validation import at_least, options, positive, unit_fraction
from tre_lightning.policy.actor_critic import (
    PolicyArgs,
    checkpoint_gradients,
    load_config,
    trains_all,
)
from tre_lightning.policy.tokenizers import (
    check_special_tokens,
    load_tokenizer,
    vocabulary_size,
    word_tokenizer,
)
from tre_lightning.tasks.alignment.pairs import PairBatch, PreferencePairs
from tre_lightning.tasks.alignment.scorer import context_length, scalar_scores, set_pad_token
from tre_lightning.training.optim import decaying_adamw


def preference_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor, centering_coef: float
) -> Tensor:
    """Bradley-Terry loss of each pair with centred scores, nats, ``[B]``.

    ``-log sigmoid(chosen - rejected - margin) + centering_coef * (chosen + rejected)^2``.

    The margin is that of Llama 2 (Touvron et al. 2023, arXiv 2307.09288); the second term, which
    fixes the scores' otherwise free offset at 0, is Eisenstein et al. 2023 (arXiv 2312.09244), in
    trl ``center_rewards_coefficient``.

    Args:
        chosen: scores of the better responses, ``[B]``.
        rejected: scores of the worse responses, ``[B]``.
        margin: by how much they should differ at least, ``[B]``; 0 = no such demand.
        centering_coef: weight of the second term.
    """
    return centering_coef * (chosen + rejected).square() - logsigmoid(chosen - rejected - margin)


class PairMetrics(nn.Module):
    """Means over pairs and ranks, independent of the batch layout."""

    def __init__(self) -> None:
        super().__init__()
        names = ("loss", "accuracy", "score_gap", "mean_score")
        self.means = nn.ModuleDict({name: MaskedMean() for name in names})

    def update(self, losses: Tensor, chosen: Tensor, rejected: Tensor) -> None:
        """Count some pairs, ``[B]`` each; equal scores are no success."""
        values = (losses, chosen > rejected, chosen - rejected, (chosen + rejected) / 2)
        for mean, value in zip(self.means.values(), values, strict=True):
            cast(MaskedMean, mean).update(value)

    def flush(self) -> dict[str, Tensor]:
        """``loss``, ``accuracy``, ``score_gap`` and ``mean_score``, then reset. Collective."""
        values = {name: cast(MaskedMean, mean).compute() for name, mean in self.means.items()}
        for mean in self.means.values():
            cast(MaskedMean, mean).reset()
        return {name: value.float() for name, value in values.items()}


class RewardModelModule(LightningModule):
    """Bradley-Terry training of a scalar head on a language model.

    Logs ``reward/loss``, ``reward/accuracy``, ``reward/score_gap`` and ``reward/mean_score`` of
    each batch, and the same as ``val/...`` over the validation pairs. At the end it writes a
    Hugging Face directory for ``AutoModelForSequenceClassification``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        output_dir: str,
        policy: PolicyArgs = PolicyArgs(),
        lr: float = 1e-5,
        centering_coef: float = 1e-2,
        final_lr_fraction: float = 0.1,
        warmup_fraction: float = 0.0,
    ) -> None:
        """Keep the options; nothing is loaded yet.

        Args:
            output_dir: where the trained model is written; it must not exist.
            policy: which model is trained, a language model or a classifier with one label; its
                critic is not used.
            lr: learning rate of AdamW at the start.
            centering_coef: weight of the loss that keeps the scores centred at 0; 0 = off.
            final_lr_fraction: fraction of ``lr`` at the last step, linear in between.
            warmup_fraction: fraction of the steps over which the rate rises to ``lr``, in [0, 1].
        """
        super().__init__()
        positive("model.lr", lr)
        at_least("model.final_lr_fraction", final_lr_fraction, 0)
        unit_fraction("model.warmup_fraction", warmup_fraction)
        if not centering_coef >= 0.0:
            raise ValueError(f"model.centering_coef={centering_coef} must be 0 (off) or positive")
        self.output_dir = output_dir
        self.policy_args = trains_all(options(PolicyArgs, policy))
        self.lr = lr
        self.centering_coef = centering_coef
        self.final_lr_fraction = final_lr_fraction
        self.warmup_fraction = warmup_fraction
        self._train_metrics = PairMetrics()
        self._val_metrics = PairMetrics()
        plain = {
            "output_dir": output_dir,
            "lr": lr,
            "centering_coef": centering_coef,
            "final_lr_fraction": final_lr_fraction,
            "warmup_fraction": warmup_fraction,
        }
        self.save_hyperparameters({**plain, "policy": asdict(self.policy_args)}, logger=False)

    def setup(self, stage: str) -> None:
        """Refuse to overwrite an earlier model."""
        if stage == "fit" and Path(self.output_dir).exists():
            raise ValueError(
                f"model.output_dir={self.output_dir} already exists; give another directory or "
                "delete this one"
            )

    def configure_model(self) -> None:
        """Load or build the model, and tokenize the data with its tokenizer.

        A new architecture without a tokenizer gets the words of the data. Weights are float32,
        whatever the checkpoint's type: small steps would be lost in bfloat16. For speed there is
        ``trainer.precision: bf16-mixed``.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, PreferencePairs)
        if not hasattr(self, "model"):
            self._load(data)
        context = context_length(self.model.config, self.tokenizer)
        if context is not None and data.max_length > context:
            raise ValueError(
                f"data.max_length={data.max_length} exceeds the model's context of {context} "
                "tokens; lower it"
            )
        known = vocabulary_size(self.model.config)
        data.encode(self.tokenizer, int(self.tokenizer.pad_token_id), known)

    def _load(self, data: PreferencePairs) -> None:
        config = load_config(self.policy_args)
        config.num_labels = 1
        config.use_cache = False
        source = self.policy_args.tokenizer_source
        self.tokenizer = (
            word_tokenizer(data.vocabulary(), config) if source is None else load_tokenizer(source)
        )
        self.tokenizer.padding_side = "right"
        field = f"model.policy.tokenizer={source}"
        check_special_tokens(self.tokenizer, vocabulary_size(config), field)
        set_pad_token(config, int(self.tokenizer.pad_token_id))
        kind, options = AutoModelForSequenceClassification, {"dtype": torch.float32}
        name = self.policy_args.model
        if name is None:
            model = kind.from_config(config, **options)
        else:
            model = read(
                "model.policy.model",
                name,
                lambda name: kind.from_pretrained(name, config=config, **options),
            )
        self.model = cast(PreTrainedModel, model).train()
        if self.policy_args.gradient_checkpointing:
            checkpoint_gradients(self.model)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, decaying linearly after the warm-up."""
        return decaying_adamw(
            self.model, self.trainer, self.lr, self.final_lr_fraction, self.warmup_fraction
        )

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """This rank's part of the mean loss over the batch's pairs, nats."""
        losses = self._losses(batch, self._train_metrics)
        values = self._train_metrics.flush()
        # The values are those of all ranks already.
        self.log_dict({f"reward/{name}": value for name, value in values.items()}, batch_size=1)
        # Data-parallel strategies average over ranks, which may hold unequal numbers of pairs.
        return losses.sum() * (self.trainer.world_size / batch.total_pairs)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Count the pairs."""
        self._losses(batch, self._val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all validation pairs."""
        values = self._val_metrics.flush()
        self.log_dict({f"val/{name}": value for name, value in values.items()}, sync_dist=True)

    def _losses(self, batch: PairBatch, metrics: PairMetrics) -> Tensor:
        scores = scalar_scores(self.model, batch.input_ids, batch.attention_mask)
        chosen, rejected = scores.chunk(2)
        losses = preference_loss(chosen, rejected, batch.margin, self.centering_coef)
        metrics.update(losses, chosen, rejected)
        return losses

    def on_train_end(self) -> None:
        """Write the model; its directory appears only once it is complete."""
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        target = Path(self.output_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix="partial-") as folder:
            partial = Path(folder) / "model"
            self.model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            partial.rename(target)
