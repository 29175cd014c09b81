"""Responses as text, and what in them is no text."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tre_lightning.batches import Rollout


def response_texts(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, prefix: str = ""
) -> list[str]:
    """The responses without the token that ended them and the padding after it.

    ``prefix`` is what the prompts say each of them begins with.
    """
    counted = _before_the_end(rollout).sum(1).tolist()
    rows = zip(rollout.response_ids.tolist(), counted, strict=True)
    ids = [row[:length] for row, length in rows]
    return [prefix + text for text in tokenizer.batch_decode(ids, skip_special_tokens=False)]


def invalid_responses(rollout: Rollout, vocabulary_size: int, textless: Sequence[int]) -> Tensor:
    """Whether a response has a token that stands for no text, ``[B]`` bool.

    Args:
        rollout: the responses; the token that ends one does not count.
        vocabulary_size: ids from here on are none of the tokenizer's.
        textless: the tokenizer's ids that stand for no text.
    """
    ids = rollout.response_ids
    invalid = (ids >= vocabulary_size) | torch.isin(ids, torch.tensor(textless, device=ids.device))
    return (invalid & _before_the_end(rollout)).any(1)


def _before_the_end(rollout: Rollout) -> Tensor:
    """Response tokens but for the one that ended the response, ``[B, T]`` bool."""
    mask = rollout.response_mask
    places = torch.arange(mask.shape[1], device=mask.device)
    return mask & (places < (mask.sum(1) - rollout.finished.long()).unsqueeze(1))
