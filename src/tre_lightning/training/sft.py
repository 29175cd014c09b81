"""Supervised fine-tuning (SFT) on demonstrations, as a LightningModule."""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tre_lightning.common.validation import at_least, options, positive
from tre_lightning.policy.actor_critic import (
    PolicyArgs,
    check_reading,
    checkpoint_gradients,
    load_language_model,
    refusing,
    trains_all,
)
from tre_lightning.policy.head import label_logprobs
from tre_lightning.policy.tokenizers import (
    check_special_tokens,
    load_tokenizer,
    vocabulary_size,
    word_tokenizer,
)
from tre_lightning.tasks.demonstrations import DemonstrationBatch, Demonstrations
from tre_lightning.training.optim import decaying_adamw


class SFTModule(LightningModule):
    """Cross-entropy of the response tokens; writes a Hugging Face model directory at the end."""

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        output_dir: str,
        policy: PolicyArgs = PolicyArgs(),
        lr: float = 1e-5,
        final_lr_fraction: float = 0.1,
    ) -> None:
        """Keep the options; nothing is loaded yet.

        Args:
            output_dir: where the trained model is written.
            policy: which model is trained; its critic is not used.
            lr: learning rate of AdamW at the start.
            final_lr_fraction: fraction of ``lr`` at the last step, linear in between.
        """
        super().__init__()
        positive("model.lr", lr)
        at_least("model.final_lr_fraction", final_lr_fraction, 0)
        self.output_dir = output_dir
        self.policy_args = trains_all(options(PolicyArgs, policy))
        self.lr = lr
        self.final_lr_fraction = final_lr_fraction
        plain = {"lr": lr, "final_lr_fraction": final_lr_fraction, "output_dir": output_dir}
        self.save_hyperparameters({**plain, "policy": asdict(self.policy_args)}, logger=False)

    def configure_model(self) -> None:
        """Load or build the model; a new architecture without a tokenizer gets the task's words."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, Demonstrations)
        if hasattr(self, "policy"):
            return data.encode(self.tokenizer)
        self.policy = load_language_model(self.policy_args).train()
        with refusing(self.policy_args.name):
            check_reading(self.policy)
        if self.policy_args.gradient_checkpointing:
            checkpoint_gradients(self.policy)
        source = self.policy_args.tokenizer_source
        if source is not None:
            self.tokenizer = load_tokenizer(source)
            name, known = f"model.policy.tokenizer={source}", vocabulary_size(self.policy.config)
            check_special_tokens(self.tokenizer, known, name)
        else:
            self.tokenizer = word_tokenizer(data.vocabulary(), self.policy.config)
        for name in ("eos_token_id", "pad_token_id"):
            setattr(self.policy.config, name, getattr(self.tokenizer, name))
            setattr(self.policy.generation_config, name, getattr(self.tokenizer, name))
        data.prompts.vocabulary_size = vocabulary_size(self.policy.config)
        data.encode(self.tokenizer)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, decaying linearly."""
        return decaying_adamw(self.policy, self.trainer, self.lr, self.final_lr_fraction)

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the response tokens and the end token, nats."""
        ids, attention, response = batch
        # No response token lies before the shortest prompt's end: no logits there.
        first = int(response.any(0).int().argmax())
        keep = torch.arange(first - 1, ids.shape[1] - 1, device=ids.device)
        logits = self.policy(
            input_ids=ids, attention_mask=attention, use_cache=False, logits_to_keep=keep
        ).logits
        counted = response[:, first:]
        logprobs = label_logprobs(logits[counted], ids[:, first:][counted])
        loss = -logprobs.mean()
        self.log("sft/loss", loss, batch_size=len(ids))
        return loss

    def on_train_end(self) -> None:
        """Write the model; its directory appears only once it is complete."""
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        target = Path(self.output_dir)
        with TemporaryDirectory(dir=target.parent, prefix="partial-") as folder:
            partial = Path(folder) / "model"
            self.policy.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            # Another run may have written the same model meanwhile; one of them is enough.
            if not target.exists():
                partial.rename(target)
