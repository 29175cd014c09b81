"""This package's own sampler, on the model that is trained."""

from transformers import PreTrainedModel

from tre_lightning.batches import PromptBatch, Rollout
from tre_lightning.common.seeding import uniforms
from tre_lightning.engines.base import Sampling
from tre_lightning.rollout import generate


class InProcess:
    """Each token consumes a uniform number of its row: layout and devices change no response."""

    def sample(self, model: PreTrainedModel, prompts: PromptBatch, how: Sampling) -> Rollout:
        """Sample; see :class:`~tre_lightning.engines.base.RolloutEngine`."""
        n = how.num_responses
        numbers = uniforms(
            prompts.total_rows * n,
            how.max_new_tokens,
            *("responses", how.seed, prompts.split, prompts.index),
        )
        first = prompts.first_row * n
        return generate(
            model,
            prompts,
            num_responses=n,
            uniforms=numbers[first : first + len(prompts) * n],
            eos_token_ids=how.eos_token_ids,
            pad_token_id=how.pad_token_id,
            temperature=how.temperature,
            top_p=how.top_p,
            sample_batch_size=how.sample_batch_size,
        )
