"""Scores of a reward model, a Hugging Face sequence classifier with one label, in this process.

How a prompt and a response become one text is decided here, for training and scoring alike: the
reward model's own chat template where it has one, else a transcript in the format of Anthropic's
HH data (Bai et al. 2022, arXiv 2204.05862) with the end token after it.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, Protocol, Self, cast, get_args

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tre_lightning.common.errors import read
from tre_lightning.common.validation import at_least
from tre_lightning.policy.chat import ChatPrompt, as_messages, transcript
from tre_lightning.policy.encoding import Conversation, encode_conversations, pad, tokens_around
from tre_lightning.policy.tokenizers import (
    check_known,
    check_special_tokens,
    load_tokenizer,
    vocabulary_size,
)

Dtype = Literal["float32", "bfloat16", "float16"]


class PreferenceScorer(Protocol):
    """Protocol of a reward model that scores responses, in this process or on a server."""

    def score(self, prompts: Sequence[ChatPrompt], responses: Sequence[str]) -> list[float]:
        """A score of each response to the prompt at its place; NaN = could not be scored."""


class RewardModelScorer:
    """A frozen reward model; not an nn.Module, so that checkpoints do not contain it."""

    def __init__(
        self,
        model: str,
        batch_size: int = 64,
        max_length: int | None = None,
        dtype: Dtype = "float32",
        prefix: str = "data.reward.",
    ) -> None:
        """Read the configuration; the weights are loaded when they are first needed.

        Args:
            model: directory or hub name of a sequence classifier with one label.
            batch_size: texts in a forward pass.
            max_length: longest text, tokens; a longer one gets NaN. None = the model's context.
            dtype: of the weights.
            prefix: of the options' names in messages.

        Raises:
            ValueError: if there is no such model or it has not exactly one label.
        """
        at_least(f"{prefix}batch_size", batch_size, 1)
        if max_length is not None:
            at_least(f"{prefix}max_length", max_length, 1)
        if dtype not in get_args(Dtype):
            raise ValueError(f"{prefix}dtype={dtype} is unknown; use one of {get_args(Dtype)}")
        config = read(f"{prefix}model", model, AutoConfig.from_pretrained)
        if config.num_labels != 1:
            raise ValueError(
                f"{prefix}model={model} has {config.num_labels} labels; give a sequence "
                "classifier with one (num_labels: 1)"
            )
        self.prefix = prefix
        self.name = model
        self.batch_size = batch_size
        self.max_length = max_length
        self.dtype = dtype
        self._device = torch.device("cpu")
        self._vocabulary_size = vocabulary_size(config)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The reward model's own tokenizer."""
        return read(f"{self.prefix}model", self.name, load_tokenizer)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The reward model, frozen.

        Raises:
            ValueError: if it cannot be loaded, or weights are missing in its files.
        """
        # Weights made in inference mode, as during a validation, could not be moved afterwards.
        with torch.inference_mode(False):
            model, info = read(
                f"{self.prefix}model",
                self.name,
                lambda name: AutoModelForSequenceClassification.from_pretrained(
                    name, dtype=getattr(torch, self.dtype), output_loading_info=True
                ),
            )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{self.prefix}model={self.name} has no weights for {', '.join(missing[:3])}; "
                "give a trained sequence classifier, not a language model"
            )
        if model.config.get_text_config().pad_token_id is None:
            name = f"reward.model={self.name}"
            check_special_tokens(self.tokenizer, self._vocabulary_size, name, ("pad_token",))
            set_pad_token(model.config, int(self.tokenizer.pad_token_id))
        model.config.use_cache = False
        return cast(PreTrainedModel, model.eval().requires_grad_(False).to(self._device))

    def to(self, device: torch.device | str) -> Self:
        """Score on this device from now on; costs nothing if the model is already there."""
        self._device = torch.device(device)
        if "model" in vars(self) and self.model.device != self._device:
            self.model.to(self._device)  # type: ignore[arg-type]
        return self

    @torch.no_grad()
    def score(self, prompts: Sequence[ChatPrompt], responses: Sequence[str]) -> list[float]:
        """A score of each response to the prompt at its place, float32.

        NaN = could not be scored: the text is too long, or the model's output is not finite.

        Raises:
            ValueError: for a prompt that is neither text nor messages, or unequal numbers.
        """
        check_equal_numbers(prompts, responses)
        scores = [math.nan] * len(responses)
        if not scores:
            return scores
        model = self.model
        rows = encode(self.tokenizer, prompts, responses)
        what = f"reward.model={self.name}: its token"
        check_known(map(max, filter(None, rows)), self.tokenizer, self._vocabulary_size, what)
        limit = self.max_length or context_length(model.config, self.tokenizer)
        # Texts of like length share a batch; the longest first, where memory is needed most.
        order = [i for i, row in enumerate(rows) if limit is None or len(row) <= limit]
        order.sort(key=lambda i: len(rows[i]), reverse=True)
        pad_token_id = int(model.config.get_text_config().pad_token_id)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            ids, mask = pad([rows[i] for i in batch], pad_token_id)
            # The trainer's mixed precision is not this model's.
            with torch.autocast(model.device.type, enabled=False):
                values = scalar_scores(model, ids.to(model.device), mask.to(model.device))
            for i, value in zip(batch, values.tolist(), strict=True):
                scores[i] = value if math.isfinite(value) else math.nan
        return scores


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[ChatPrompt], responses: Sequence[str]
) -> list[list[int]]:
    r"""Token ids of each prompt with its response, as a reward model reads them.

    Without a chat template the text is ``\n\nHuman: ...\n\nAssistant: ...`` (other roles by their
    own name, white space around a message stripped) between the tokens that the tokenizer puts
    around a text, and the end token follows it. Control tokens that are written in a message stay
    text: a response cannot end its turn twice.

    Raises:
        ValueError: for a prompt that is neither text nor messages, or that the chat template
            refuses.
    """
    conversations = []
    for prompt, response in zip(prompts, responses, strict=True):
        messages = [*as_messages(prompt), {"role": "assistant", "content": response}]
        conversations.append(Conversation(messages, transcript(messages)))
    rows = encode_conversations(tokenizer, conversations, "reward model", ask=False)
    if tokenizer.chat_template is not None:
        return rows
    _, behind = tokens_around(tokenizer)
    end = tokenizer.eos_token_id
    if end is not None and behind[-1:] != [end]:
        behind = [*behind, int(end)]
    return [[*row, *behind] for row in rows]


def scalar_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Scores ``[B]``, float32, of padded texts ``[B, T]``."""
    logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return logits.squeeze(-1).float()


def set_pad_token(config: PreTrainedConfig, pad_token_id: int) -> None:
    """Set the padding token of a classifier, on its text part if it is multimodal."""
    config.pad_token_id = pad_token_id
    config.get_text_config().pad_token_id = pad_token_id


def context_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Context length of a model, tokens; None = not known."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    # A tokenizer without a limit of its own has one of about 1e30.
    known = [int(n) for n in (context, tokenizer.model_max_length) if n is not None and n < 1e9]
    return min(known, default=None)


def check_equal_numbers(prompts: Sequence[ChatPrompt], responses: Sequence[str]) -> None:
    """Raise ValueError unless there is one response for each prompt."""
    if len(prompts) != len(responses):
        raise ValueError(
            f"{len(prompts)} prompts and {len(responses)} responses; give one response a prompt"
        )
