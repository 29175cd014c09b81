"""Options of sampling, in training and evaluation; each field states its unit."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from tre_lightning.common.validation import at_least, one_of, options, positive

EngineName: TypeAlias = Literal["in_process", "continuous_batching", "vllm"]
Correction: TypeAlias = Literal["truncate", "mask", "mask_response"]


@dataclass(frozen=True)
class VLLMArgs:
    """Options of the engine ``vllm``; docs/rollout.md says what it was tried on.

    Args:
        gpu_memory_utilization: fraction of the GPU's memory that vLLM holds while it samples, in
            (0, 1]; the training's weights and optimizer state lie beside it.
        max_model_len: longest prompt and response together, tokens; none = the model's context.
    """

    gpu_memory_utilization: float = 0.3
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(
                f"model.rollout.vllm.gpu_memory_utilization={self.gpu_memory_utilization} must "
                "lie in (0, 1]"
            )
        if self.max_model_len is not None:
            at_least("model.rollout.vllm.max_model_len", self.max_model_len, 1)


@dataclass(frozen=True)
class RolloutArgs:
    """Options of sampling in training.

    Args:
        num_responses: responses a prompt.
        max_new_tokens: longest response, tokens.
        temperature: of the sampling policy, > 0; log-probabilities are taken at it too.
        sample_batch_size: responses sampled at a time on one device, in training and evaluation;
            bounds the memory of the key-value cache and, rounding aside, changes no response; none
            = all at once.
        engine: the sampler: ``in_process`` = this package's own sampler, ``continuous_batching`` =
            that of transformers, ``vllm`` = vLLM on the training's GPU.
        vllm: options of that engine.
        max_importance_weight: each token's policy loss is multiplied by p / q, with p the
            probability by the policy that is trained, before the update, and q the one by the
            engine that sampled; this is the largest weight, >= 1; none = no largest, and without a
            smallest too no correction.
        min_importance_weight: the smallest weight, above 0 and at most 1; none = no smallest.
        importance_correction: what is done with weights beyond these: ``truncate`` = the bound
            instead, ``mask`` = 0 at the token, ``mask_response`` = 0 at all tokens of a response
            whose weights' geometric mean lies beyond, the others untouched.
    """

    num_responses: int = 8
    max_new_tokens: int = 1024
    temperature: float = 1.0
    sample_batch_size: int | None = None
    engine: EngineName = "in_process"
    vllm: VLLMArgs = VLLMArgs()
    max_importance_weight: float | None = None
    min_importance_weight: float | None = None
    importance_correction: Correction = "truncate"

    def __post_init__(self) -> None:
        at_least("model.rollout.num_responses", self.num_responses, 1)
        at_least("model.rollout.max_new_tokens", self.max_new_tokens, 1)
        positive("model.rollout.temperature", self.temperature)
        if self.sample_batch_size is not None:
            at_least("model.rollout.sample_batch_size", self.sample_batch_size, 1)
        one_of("model.rollout.engine", self.engine, get_args(EngineName))
        # A mapping in a saved configuration.
        object.__setattr__(self, "vllm", options(VLLMArgs, self.vllm))
        if self.max_importance_weight is not None:
            at_least("model.rollout.max_importance_weight", self.max_importance_weight, 1)
        least = self.min_importance_weight
        if least is not None and not 0.0 < least <= 1.0:
            raise ValueError(f"model.rollout.min_importance_weight={least} must lie in (0, 1]")
        how = self.importance_correction
        one_of("model.rollout.importance_correction", how, get_args(Correction))
        if how != "truncate" and not self.corrects:
            raise ValueError(
                f"model.rollout.importance_correction={how} needs bounds; give "
                "model.rollout.max_importance_weight, min_importance_weight or both"
            )

    @property
    def corrects(self) -> bool:
        """Whether the mismatch of sampler and trainer is corrected."""
        return self.max_importance_weight is not None or self.min_importance_weight is not None


@dataclass(frozen=True)
class EvaluationArgs:
    """Options of sampling for held-out prompts.

    Args:
        num_responses: responses a prompt; pass@1 and pass@k with k = num_responses are reported.
        temperature: of the sampling, > 0.
        top_p: nucleus to sample from, in (0, 1]; 1 = the whole distribution.
        num_samples_logged: responses logged as text after every validation.
    """

    num_responses: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    num_samples_logged: int = 4

    def __post_init__(self) -> None:
        at_least("model.evaluation.num_responses", self.num_responses, 1)
        at_least("model.evaluation.num_samples_logged", self.num_samples_logged, 0)
        positive("model.evaluation.temperature", self.temperature)
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(
                f"model.evaluation.top_p={self.top_p} must lie in (0, 1]; 1 samples from all"
            )
