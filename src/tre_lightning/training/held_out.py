"""Held-out prompts: the responses to them are sampled, scored, and counted or given back."""

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tre_lightning.batches import PromptBatch, Rollout
from tre_lightning.policy.encoding import textless_tokens
from tre_lightning.training.responses import invalid_responses

if TYPE_CHECKING:
    from tre_lightning.training.ppo import PPOModule


def validate(module: "PPOModule", prompts: PromptBatch) -> dict[str, Any]:
    """Count the responses to a batch of a held-out set; gives callbacks rollout, texts, scores."""
    rollout, texts, scores = _answer(module, prompts)
    own_text = getattr(module.task, "own_text", "")
    module.evaluations.of(prompts.split, module.device).update(
        scores,
        rollout.response_mask,
        rollout.finished,
        invalid_responses(rollout, len(module.tokenizer), _textless(module.tokenizer, own_text)),
        binary=module.task.binary_scores,
        answers=module.task.answers(texts, prompts),
        standard_errors=module.trainer.testing,
    )
    return {"rollout": rollout, "texts": texts, "scores": scores}


def predict(module: "PPOModule", prompts: PromptBatch) -> list[dict[str, Any]]:
    """One record a prompt: prompt, responses and scores (None = could not be scored)."""
    _, texts, scores = _answer(module, prompts)
    n = module.evaluation_args.num_responses
    values = [None if math.isnan(score) else score for score in scores.tolist()]
    return [
        {
            "prompt": prompt,
            "responses": texts[i * n : (i + 1) * n],
            "scores": values[i * n : (i + 1) * n],
        }
        for i, prompt in enumerate(prompts.texts)
    ]


@lru_cache(maxsize=1)
def _textless(tokenizer: PreTrainedTokenizerBase, own_text: str) -> list[int]:
    """Tokens that stand for no text; kept, as reading the vocabulary takes long."""
    return textless_tokens(tokenizer, own_text)


def _answer(module: "PPOModule", prompts: PromptBatch) -> tuple[Rollout, list[str], Tensor]:
    rollout = module.sample(prompts, module.evaluation_args)
    texts = module.texts(rollout)
    scores = module.score(texts, prompts)
    module.task.scorer_timeouts()  # not those of the next iteration
    return rollout, texts, scores
