"""The engine ``continuous_batching``: that of transformers, on the model that is trained.

A row that ends makes room for the next one, and keys and values lie in pages, so nothing is padded.
Responses depend on how rows are laid out: random numbers are drawn for a batch, from a seed of its
own for every batch of prompts and every rank.

Source: https://huggingface.co/docs/transformers/continuous_batching
"""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig, PreTrainedModel

from tre_lightning.batches import PromptBatch, Rollout
from tre_lightning.common.seeding import derived_seed
from tre_lightning.policy.reading import eval_mode
from tre_lightning.sampling.base import Sampling, prompt_tokens, rollout_of

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig

_PREFILL = 512  # least tokens of one forward pass; without flash attention it has a dense mask
_SINCE = "5.17"  # of transformers; has page_size
_HALF = (torch.bfloat16, torch.float16)


def check_continuous_batching(sharded: bool) -> None:
    """Raise ValueError for an old transformers, or where the devices share one model."""
    if Version(transformers.__version__) < Version(_SINCE):
        raise ValueError(
            f"model.rollout.engine=continuous_batching needs transformers {_SINCE}, not "
            f"{transformers.__version__}; pip install 'transformers>={_SINCE}'"
        )
    if sharded:  # a shard waits for the others at every forward pass
        raise ValueError(
            "model.rollout.engine=continuous_batching needs whole models, not shards; use "
            "in_process, or trainer.strategy ddp"
        )


class ContinuousBatching:
    """Engine of transformers' continuous batching; ``sample_batch_size`` bounds rows and pages."""

    def sample(self, model: PreTrainedModel, prompts: PromptBatch, how: Sampling) -> Rollout:
        """Sample; see :class:`~tre_lightning.sampling.base.RolloutEngine`.

        Raises:
            RuntimeError: if a request fails.
        """
        from transformers import ContinuousBatchingConfig  # early 5.x releases lack it

        inputs = prompt_tokens(prompts)
        rows = len(inputs) * how.num_responses
        at_a_time = min(how.sample_batch_size or rows, rows)
        on_cuda = model.device.type == "cuda"
        page = 256 if on_cuda else 32  # flash attention wants the former
        longest = max(map(len, inputs)) + how.max_new_tokens
        key = ("responses", how.seed, prompts.split, prompts.index, prompts.first_row)
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=(at_a_time + 1) * math.ceil(longest / page),
            max_batch_tokens=max(at_a_time, _PREFILL),
            max_requests_per_batch=at_a_time,
            return_logprobs=True,
            seed=derived_seed(*key),
            auto_switch_to_flash=model.dtype in _HALF,
        )
        generation = GenerationConfig(
            do_sample=True,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=0,
            max_new_tokens=how.max_new_tokens,
            eos_token_id=list(how.eos_token_ids),
            pad_token_id=how.pad_token_id,
            num_return_sequences=how.num_responses,
        )
        devices = [model.device] if on_cuda else []
        # Seeding it seeds torch.
        with eval_mode(model), torch.random.fork_rng(devices), _fast_collection():
            outputs = _run(model, generation, config, inputs)
        tokens = [output.generated_tokens for output in outputs]
        return rollout_of(prompts, how, tokens, [output.logprobs for output in outputs])


def _run(
    model: PreTrainedModel,
    generation: GenerationConfig,
    config: "ContinuousBatchingConfig",
    inputs: list[list[int]],
) -> list[Any]:
    """The outputs of all responses, those of one prompt side by side."""
    manager: Any = model.init_continuous_batching(generation, config)  # type: ignore[operator]
    # All requests are there before it starts: what it batches depends on no clock.
    names = manager.add_requests(inputs, max_new_tokens=generation.max_new_tokens)
    children = [f"__child#{j}" for j in range(generation.num_return_sequences - 1)]
    names = [name + suffix for name in names for suffix in ("", *children)]
    found: dict[str, Any] = {}
    manager.start()
    try:
        while len(found) < len(names):
            output = manager.get_result(timeout=1)
            if output is not None:
                found[output.request_id] = output
            elif not manager.is_running():
                break
    finally:
        manager.stop(block=True)
        manager.destroy()
    for name in names:
        if name not in found or found[name].error:
            reason = found[name].error if name in found else "no result"
            raise RuntimeError(f"continuous batching failed at {name}: {reason}")
    return [found[name] for name in names]


@contextmanager
def _fast_collection() -> Iterator[None]:
    """Context that speeds up the garbage collections of a manager that stops."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
