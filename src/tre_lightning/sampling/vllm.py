"""The engine ``vllm``: vLLM in this process, on the GPU that trains.

NOT RUN: there was no GPU here. It is written against vLLM 0.33 (its documented classes LLM,
SamplingParams and TokensPrompt) and tested against a stand-in with those signatures.

Between two calls the engine sleeps and holds no GPU memory; each call wakes it, loads the weights
as they are now, samples, and puts it to sleep. Every rank has an engine of its own.

Sources: https://docs.vllm.ai/en/stable/api/vllm/entrypoints/llm/ (apply_model, sleep, wake_up),
https://docs.vllm.ai/en/stable/features/sleep_mode/ (order of waking and loading), and TRL's
VLLMGeneration (https://huggingface.co/docs/trl/main/en/vllm_integration), which does the same.
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tre_lightning.batches import PromptBatch, Rollout
from tre_lightning.common.distributed import world
from tre_lightning.common.seeding import derived_seed
from tre_lightning.policy.lora import has_adapters, merged_state_dict
from tre_lightning.policy.sharding import whole
from tre_lightning.sampling.base import Sampling, prompt_tokens, rollout_of
from tre_lightning.sampling.options import VLLMArgs

_SEEDS = 2**31  # vLLM adds the number of a response to the seed of its prompt


def check_vllm() -> None:
    """Raise ValueError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "model.rollout.engine=vllm needs the package vllm; pip install 'tre-lightning[vllm]'"
        )


class VLLM:
    """Engine of vLLM; a response depends on its row's seed and, by rounding, on its batch."""

    def __init__(self, args: VLLMArgs) -> None:
        """The engine starts with the first call."""
        self.args = args
        self._llm: Any = None

    def sample(self, model: PreTrainedModel, prompts: PromptBatch, how: Sampling) -> Rollout:
        """Sample; see :class:`~tre_lightning.sampling.base.RolloutEngine`."""
        check_vllm()
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        n = how.num_responses
        llm = self._awake(model, how)
        rows = range(prompts.first_row, prompts.first_row + len(prompts))
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in prompt_tokens(prompts)],
            [
                SamplingParams(
                    n=n,
                    temperature=how.temperature,
                    top_p=how.top_p,
                    max_tokens=how.max_new_tokens,
                    stop_token_ids=list(how.eos_token_ids),
                    logprobs=0,  # that of the sampled token alone
                    seed=derived_seed("responses", how.seed, prompts.split, prompts.index, row)
                    % _SEEDS,
                    detokenize=False,
                )
                for row in rows
            ],
            use_tqdm=False,
        )
        llm.sleep(level=2)  # frees weights and cache: both are made anew
        answers = [answer for output in outputs for answer in output.outputs]
        tokens = [list(answer.token_ids) for answer in answers]
        logprobs = [
            [found[token].logprob for token, found in zip(ids, answer.logprobs, strict=True)]
            for ids, answer in zip(tokens, answers, strict=True)
        ]
        return rollout_of(prompts, how, tokens, logprobs)

    def _awake(self, model: PreTrainedModel, how: Sampling) -> Any:
        """The engine with the model's weights."""
        if self._llm is None:
            self._llm = _start(model, self.args, how)
            self._llm.sleep(level=2)
        torch.cuda.empty_cache()  # what training has left unused, for vLLM to take
        self._llm.wake_up(tags=["weights"])
        self._llm.apply_model(lambda inner: inner.load_weights(_weights(model)))
        self._llm.wake_up(tags=["kv_cache"])
        self._llm.reset_prefix_cache()  # of the weights before
        return self._llm


def _start(model: PreTrainedModel, args: VLLMArgs, how: Sampling) -> Any:
    """An engine for models of this configuration, with no weights yet."""
    # The engine runs in this process: apply_model gets a function with the training's tensors.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    rank, ranks = world()
    distributed: dict[str, Any] = {}
    if ranks > 1:
        os.environ.setdefault("RANK", str(rank))  # Lightning sets all others
        distributed = {"distributed_executor_backend": "external_launcher"}
    kind = model.device.type
    mixed = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if mixed else model.dtype
    with tempfile.TemporaryDirectory() as directory:
        model.config.save_pretrained(directory)
        return LLM(
            model=directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=str(dtype).removeprefix("torch."),
            seed=0,
            gpu_memory_utilization=args.gpu_memory_utilization,
            max_model_len=args.max_model_len,
            enable_sleep_mode=True,
            logprobs_mode="processed_logprobs",  # at the temperature
            **({} if how.sample_batch_size is None else {"max_num_seqs": how.sample_batch_size}),
            **distributed,
        )


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Whole weights by the names of a plain model, adapters merged."""
    named = merged_state_dict(model).items() if has_adapters(model) else model.named_parameters()
    for name, weight in named:
        yield name, whole(weight.detach())  # a sharded one by all ranks at once
