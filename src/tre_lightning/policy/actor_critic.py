"""The policy (a Hugging Face causal language model) and its critic."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from tre_lightning.batches import Rollout, sequence_inputs
from tre_lightning.common.distributed import world
from tre_lightning.common.errors import Refused, read
from tre_lightning.common.validation import one_of, options
from tre_lightning.ops import PolicyOutputs
from tre_lightning.ops.functions import LossSum
from tre_lightning.policy.head import (
    HeadOptions,
    TokenLosses,
    head_loss,
    head_outputs,
    plain_head,
)
from tre_lightning.policy.lora import LoraArgs, add_adapters, has_adapters, merged_state_dict
from tre_lightning.policy.packing import recomputing
from tre_lightning.policy.reading import Layout, before, is_noisy, laid_out, reading, trunk_of
from tre_lightning.policy.sharding import (
    gathered_layers,
    is_sharded,
    no_inference_mode,
    shard,
    whole_state_dict,
)
from tre_lightning.policy.tokenizers import vocabulary_size

T = TypeVar("T")
_log = logging.getLogger(__name__)

Critic: TypeAlias = Literal["separate", "shared", "none"]


@dataclass(frozen=True)
class PolicyArgs:
    """Which model is trained.

    Args:
        model: directory or hub name of a causal language model; its tokenizer comes with it.
        architecture: instead of ``model``, build one from scratch: a Hugging Face configuration as
            a mapping with ``model_type`` (for example qwen2, hidden_size, vocab_size).
        tokenizer: directory or hub name of the tokenizer; none = the model's.
        critic: ``separate`` = a model of its own (the paper's choice), ``shared`` = a value head on
            the policy's trunk, ``none`` = no critic and no value head.
        critic_model: directory or hub name the separate critic starts from; none = a copy of the
            policy.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping
            them; changes memory and speed, not the result.
        lora: train low-rank adapters in policy and critic instead of all their weights; none = all.
        cpu_offload: with a strategy that shards, keep the shards of weights, gradients and AdamW's
            moments in host memory: 16 bytes a trained float32 parameter less, shared by all
            devices; every pass copies weights to them, every micro-batch gradients back, and AdamW
            runs on the CPU.
    """

    model: str | None = None
    architecture: dict[str, Any] | None = None
    tokenizer: str | None = None
    critic: Critic = "separate"
    critic_model: str | None = None
    gradient_checkpointing: bool = False
    lora: LoraArgs | None = None
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        one_of("model.policy.critic", self.critic, get_args(Critic))
        if self.lora is not None:  # a mapping in a saved configuration
            object.__setattr__(self, "lora", options(LoraArgs, self.lora))
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError(
                "model.policy.architecture needs a model_type (for example model_type: qwen2), it "
                f"has {sorted(self.architecture)}"
            )
        if self.critic != "separate" and self.critic_model is not None:
            raise ValueError(
                f"model.policy.critic_model={self.critic_model} needs model.policy.critic="
                f"separate, not {self.critic}"
            )

    @property
    def name(self) -> str:
        """How a message names the model."""
        if self.model is not None:
            return f"model.policy.model={self.model}"
        kind = None if self.architecture is None else self.architecture["model_type"]
        return f"model.policy.architecture.model_type={kind}"

    @property
    def tokenizer_source(self) -> str | None:
        """Directory or hub name of the tokenizer; None while no model is named."""
        return self.tokenizer or self.model


def trains_all(args: PolicyArgs) -> PolicyArgs:
    """The same, for supervised training.

    Raises:
        ValueError: if they ask for adapters, or for shards in host memory.
    """
    if args.lora is not None:
        raise ValueError(
            "model.policy.lora is for reinforcement learning; leave it out of supervised training"
        )
    if args.cpu_offload:
        raise ValueError(
            "model.policy.cpu_offload=true is for reinforcement learning; leave it out of "
            "supervised training"
        )
    return args


class ActorCritic(nn.Module):
    """A causal language model with a value for every response token, or without values."""

    def __init__(
        self, policy: PreTrainedModel, critic: PreTrainedModel | None, *, has_values: bool = True
    ) -> None:
        """``critic`` is a trunk without a head, or None to share the policy's."""
        super().__init__()
        self.policy = policy
        self.critic = critic
        self._head: list[nn.Linear | None] = []  # a list, so that it is no second parameter
        self._offloaded = False
        self._critic_vocabulary = vocabulary_size((critic or policy).config) or 2**31
        width = _hidden_width((critic or policy).config)
        self.value_head = nn.Linear(width, 1) if has_values else None
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            trained = next(p for p in policy.parameters() if p.requires_grad)
            self.value_head.to(dtype=trained.dtype)
        self.train()

    def train(self, mode: bool = True) -> "ActorCritic":
        """Set the mode of the value head; policy and critic stay in evaluation mode.

        What training mode adds to them is noise (dropout, layers left out, jitter or draws of a
        router), and a probability ratio must not carry it. The exception are layers that checkpoint
        their gradients, which they do in training mode only.
        """
        super().train(mode)
        for model in filter(None, (self.policy, self.critic)):
            model.eval()
            for layer in model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = mode and layer.gradient_checkpointing
        return self

    def try_out(self, args: PolicyArgs) -> None:
        """See how policy and critic read, on a few tokens; with whole weights.

        Raises:
            Refused: if one of the two cannot be trained here.
        """
        with refusing(args.name):
            check_reading(self.policy)
            if self.head is not None or (self.critic is None and self.value_head is not None):
                reading(trunk_of(self.policy))
        name = args.name
        if args.critic_model is not None:
            name = f"model.policy.critic_model={args.critic_model}"
        with refusing(name):
            trunk = trunk_of(self.policy) if self.critic is None else self.critic
            for model in filter(None, (self.policy, self.critic)):
                if is_noisy(model):
                    raise Refused(
                        f"{type(model).__name__} draws random numbers in a training pass, which a "
                        "probability ratio must not carry; switch them off in its configuration"
                    )
            if self.value_head is not None and reading(trunk).width != self.value_head.in_features:
                raise Refused(
                    f"the last hidden states of {type(trunk).__name__} have {reading(trunk).width} "
                    f"numbers, not {self.value_head.in_features} as its configuration says"
                )

    @property
    def head(self) -> nn.Linear | None:
        """The policy's linear head; None where it is more than that. Found at the first use."""
        if not self._head:
            self._head.append(plain_head(self.policy))
        return self._head[0]

    @property
    def packs(self) -> bool:
        """Whether rows are computed side by side, without padding and a common prompt once."""
        models = filter(None, (self.policy, trunk_of(self.policy), self.critic))
        return all(reading(model).packed for model in models)

    @classmethod
    def load(cls, args: PolicyArgs, seed: int = 0) -> "ActorCritic":
        """Read the policy and its critic; ``seed`` is that of adapters.

        Raises:
            ValueError: if neither or both of ``model`` and ``architecture`` are given, or the
                directory holds no model.
        """
        if args.lora is not None and args.model is None:
            raise ValueError(
                "model.policy.lora needs weights to freeze; give model.policy.model or a "
                "warm_start, not model.policy.architecture alone"
            )
        policy, critic = load_language_model(args), None
        if args.critic_model is not None:
            config = without_dropout(AutoConfig.from_pretrained(args.critic_model))
            critic = AutoModel.from_pretrained(
                args.critic_model, config=config, dtype=weight_type(args)
            )
        return cls.build(args, policy, critic, seed)

    @classmethod
    def build(
        cls,
        args: PolicyArgs,
        policy: PreTrainedModel,
        critic: PreTrainedModel | None,
        seed: int = 0,
    ) -> "ActorCritic":
        """Make the critic that ``args`` ask for, and the adapters.

        Args:
            args: how.
            policy: the plain policy.
            critic: the trunk of ``args.critic_model``, where one is named.
            seed: of the adapters.
        """
        if args.critic == "separate" and critic is None:
            trunk = trunk_of(policy)
            # Frozen weights serve both.
            shared = {} if args.lora is None else {id(p): p for p in trunk.parameters()}
            critic = copy.deepcopy(trunk, shared)
        for name, model in (("policy", policy), ("critic", critic)):
            if model is not None and args.lora is not None:
                add_adapters(model, args.lora, "adapters", name, seed)
            if model is not None and args.gradient_checkpointing:
                checkpoint_gradients(model)
        return cls(policy, critic, has_values=args.critic != "none")

    def outputs(self, batch: Rollout, asked: HeadOptions) -> tuple[PolicyOutputs, Tensor | None]:
        """What the policy says of the n counted response tokens, and values ``[B, T]`` (float32).

        The tokens are those of ``response_mask``, in reading order. Without a critic there are no
        values (None).
        """
        labels = batch.response_ids[batch.response_mask]
        source, head, values = self._read(batch, asked)
        return head_outputs(source, head, labels, asked), values

    def loss(
        self, batch: Rollout, asked: HeadOptions, objective: TokenLosses
    ) -> tuple[LossSum, Tensor | None]:
        """Sum of the losses of the n counted response tokens, and values ``[B, T]`` (float32).

        The objective is called in here, where a sharded head has its weight at hand.

        Args:
            batch: the tokens are those of ``response_mask``, in reading order.
            asked: what ``objective`` needs.
            objective: makes losses ``[..., m]`` of the outputs of some rows of the n tokens.
        """
        labels = batch.response_ids[batch.response_mask]
        source, head, values = self._read(batch, asked)
        return head_loss(source, head, labels, asked, objective), values

    def _read(
        self, batch: Rollout, asked: HeadOptions
    ) -> tuple[Tensor, nn.Linear | None, Tensor | None]:
        """One pass of policy and critic: what the head gets, the head where it is linear, values.

        As :func:`tre_lightning.policy.head.head_outputs` takes the first two.
        """
        (ids, mask), counted = sequence_inputs(batch), batch.response_mask
        head = self.head if asked.takes_hidden else None
        source, hidden = head_input(self.policy, head, ids, mask, counted)
        return source, head, self._values(batch, hidden)

    def values(self, batch: Rollout) -> Tensor | None:
        """Values ``[B, T]`` (float32), without what the policy says; None without a critic."""
        return self._values(batch)

    def _values(self, batch: Rollout, hidden: Tensor | None = None) -> Tensor | None:
        """The same; ``hidden``: the policy's last hidden states ``[n, D]``, where they are known.

        Apart, as a sharded model frees its weights after ``values``.
        """
        if self.value_head is None:
            return None
        (ids, mask), counted = sequence_inputs(batch), batch.response_mask
        if self.critic is not None:
            # Its table may lack rows that stand for no token; the others' are checked before.
            known = ids.clamp(max=self._critic_vocabulary - 1)
            hidden = _layout(self.critic, known, mask, counted).hidden_states(self.critic)
        elif hidden is None:
            trunk = trunk_of(self.policy)
            hidden = _layout(trunk, ids, mask, counted).hidden_states(trunk)
        values: Tensor = (
            self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()
        )
        return values.new_zeros(counted.shape).masked_scatter(counted, values)

    def sample(self, use: Callable[[PreTrainedModel], T]) -> T:
        """What ``use`` makes of the policy, whose weights are whole meanwhile; no gradients."""
        with no_inference_mode() if is_sharded(self) else nullcontext():
            return self._with_policy(use)

    def _with_policy(self, use: Callable[[PreTrainedModel], T]) -> T:
        with gathered_layers(self.policy):
            return use(self.policy)

    def shard(self, device_type: str, precision: str, *, cpu_offload: bool = False) -> None:
        """Shard the weights over all ranks, as :func:`tre_lightning.policy.sharding.shard` says."""
        _ = self.head  # found by a trial, which needs whole weights
        for model in filter(None, (self.policy, trunk_of(self.policy), self.critic)):
            reading(model)
        methods = ("outputs", "loss", "values", "_with_policy")
        shard(self, device_type, precision, *methods, cpu_offload=cpu_offload)
        self._offloaded = cpu_offload

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Lightning moves the whole module to its device; offloaded shards must not go along.

        Buffers are on the device since they were sharded.
        """
        own = (lambda tensor: tensor.to(fn(tensor).dtype)) if self._offloaded else fn
        return super()._apply(own, recurse)  # type: ignore[no-untyped-call]

    def save_pretrained(self, directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the policy, without the critic, as a plain Hugging Face model directory.

        Adapters are merged into the weights that they change. All ranks must call it; the first
        one writes.
        """
        weights = whole_state_dict(self.policy) if is_sharded(self) else None
        if world()[0] > 0:
            return
        if has_adapters(self.policy):
            weights = merged_state_dict(self.policy)
        self.policy.save_pretrained(directory, state_dict=weights)
        tokenizer.save_pretrained(directory)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the language model (a shared trunk included)."""
        return _trained(self.policy)

    def critic_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the value head and the separate critic, as far as there are any."""
        return [p for part in (self.critic, self.value_head) if part for p in _trained(part)]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def head_input(
    policy: PreTrainedModel,
    head: nn.Linear | None,
    input_ids: Tensor,
    mask: Tensor,
    counted: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the head gets or gives before each counted token, and the hidden states there.

    Args:
        policy: the language model.
        head: its head where hidden states are wanted; None asks for the logits.
        input_ids: ``[B, P + T]`` prompt and response.
        mask: ``[B, P + T]`` bool, True = a real token.
        counted: ``[B, T]`` bool, the n response tokens, in reading order.

    Returns:
        Last hidden states ``[n, D]``, or logits ``[n, V]``; last hidden states ``[n, D]``.
    """
    trunk = trunk_of(policy)
    if head is not None:
        hidden = _layout(trunk, input_ids, mask, counted).hidden_states(trunk)
        return hidden, hidden
    layout = _layout(policy, input_ids, mask, counted)
    seen: list[Tensor] = []
    hook = trunk.register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state)
    )
    try:
        logits = layout.logits(policy)
    finally:
        hook.remove()
    if not seen:  # a model that calls its trunk's parts itself
        return logits, _layout(trunk, input_ids, mask, counted).hidden_states(trunk)
    return logits, layout.pick(seen[0])


def _layout(model: nn.Module, ids: Tensor, mask: Tensor, counted: Tensor) -> Layout:
    """For the outputs right before each of the n counted tokens, ``[B, T]``."""
    prompt = ids.shape[1] - counted.shape[1]
    return laid_out(model, ids, mask, before(counted, prompt), prompt)


def load_config(args: PolicyArgs) -> PreTrainedConfig:
    """The model's configuration, without dropout.

    Raises:
        ValueError: unless exactly one of ``model`` and ``architecture`` is given, or there is no
            such model.
    """
    if (args.model is None) == (args.architecture is None):
        raise ValueError(
            "give exactly one of model.policy.model (a directory or hub name) and "
            f"model.policy.architecture, not model={args.model}, architecture={args.architecture}"
        )
    if args.architecture is not None:
        fields = dict(args.architecture)
        return without_dropout(AutoConfig.for_model(fields.pop("model_type"), **fields))
    return without_dropout(read("model.policy.model", str(args.model), AutoConfig.from_pretrained))


def load_language_model(args: PolicyArgs) -> PreTrainedModel:
    """The causal language model that ``args`` name, from a directory, the hub or from scratch."""
    config, kind, dtype = load_config(args), AutoModelForCausalLM, weight_type(args)
    if args.model is None:
        return cast(PreTrainedModel, kind.from_config(config, dtype=dtype))
    return cast(PreTrainedModel, kind.from_pretrained(args.model, config=config, dtype=dtype))


def weight_type(args: PolicyArgs) -> torch.dtype:
    """Type in which weights are loaded, whatever that of the files is.

    Trained weights have the type of ``trainer.precision``: Lightning makes it torch's default while
    the model is built. That is float32 unless the precision is a ``-true`` one, as AdamW's small
    steps would be lost in a hub model's bfloat16.
    """
    bfloat16 = args.lora is not None and args.lora.bfloat16_base
    return torch.bfloat16 if bfloat16 else torch.get_default_dtype()


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Have a model compute its activations again in the backward pass.

    Only in training mode, in which it has no key-value cache.

    Raises:
        ValueError: if the model cannot.
    """
    with warnings.catch_warnings():  # the name has a successor, which early 5.x releases lack
        warnings.simplefilter("ignore", FutureWarning)
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputing})
        except ValueError as error:
            raise ValueError(f"model.policy.gradient_checkpointing=true: {error}") from error


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration, and those of its parts, with every dropout at 0.

    Evaluation mode switches it off, but for layers that checkpoint their gradients.
    """
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    return config


def _hidden_width(config: PreTrainedConfig) -> int:
    """Numbers of a last hidden state; OPT may have a width of its own for them."""
    text = config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Have a refusal begin with the option that names the model."""
    try:
        yield
    except Refused as error:
        raise Refused(f"{name}: {error}; give another model") from error


def check_reading(model: PreTrainedModel) -> None:
    """Try out how a policy reads; say so where it will sample slowly.

    Raises:
        Refused: see :func:`tre_lightning.policy.reading.reading`.
    """
    if not reading(model).cached:
        _log.warning(
            "%s has no decoding state that says what whole passes say (of rows of unequal length): "
            "each sampled token costs a pass over its whole row",
            type(model).__name__,
        )


def parameter_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Shape of every parameter by name."""
    return {name: list(p.shape) for name, p in module.named_parameters()}


def refuse_other_model(ours: Mapping[str, list[int]], saved: Mapping[str, list[int]]) -> None:
    """Compare the parameter shapes of the configured model with those in a checkpoint.

    Raises:
        ValueError: if a parameter is not the same, or is in one of them only.
    """
    for name in sorted(ours.keys() | saved.keys()):
        if ours.get(name) != saved.get(name):
            raise ValueError(
                f"ckpt_path is a checkpoint of another model: {name} has shape {saved.get(name)} "
                f"there and {ours.get(name)} in model.policy; give the checkpoint's own "
                "configuration"
            )
