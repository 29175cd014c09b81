"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) in a frozen model, by peft.

The adapters are put into the model's own layers: it stays a PreTrainedModel, and its head, trunk
and key-value cache are found where they were. peft is an optional dependency.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tre_lightning.common.seeding import generator
from tre_lightning.common.validation import at_least, positive

if TYPE_CHECKING:
    from peft.tuners.lora import Linear

_ADAPTER = "default"
_LINEAR = (nn.Linear, Conv1D)
_SAMPLED = 1024  # numbers of each frozen parameter in the fingerprint


@dataclass(frozen=True)
class LoraArgs:
    """Adapters ``alpha / rank * B A`` beside frozen weights; only they are trained.

    There is no dropout: a probability ratio must not carry its noise.

    Args:
        rank: rows of A and columns of B.
        alpha: numerator of the factor in front of them.
        target_modules: names of the layers that get adapters (q_proj, v_proj, ...); ``all-linear``
            = every linear layer but the head. Experts and routers that a mixture of experts keeps
            in other forms (one tensor of all experts) stay frozen.
        bfloat16_base: hold the frozen weights in bfloat16, half the memory; the adapters and the
            value head keep the type that ``trainer.precision`` says.
    """

    rank: int = 16
    alpha: int = 32
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    bfloat16_base: bool = False

    def __post_init__(self) -> None:
        at_least("model.policy.lora.rank", self.rank, 1)
        positive("model.policy.lora.alpha", self.alpha)
        if not self.target_modules:
            raise ValueError(
                "model.policy.lora.target_modules is empty; name layers, or leave it out for "
                "all-linear"
            )


def add_adapters(model: PreTrainedModel, args: LoraArgs, *key: int | str) -> None:
    """Freeze a model and put trainable adapters into it, which change nothing yet (B = 0).

    ``key`` is that of the random numbers of A.

    Raises:
        ValueError: without peft, if no layer has such a name, or if the head or an embedding has.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear, LoraLayer
    except ImportError as error:
        raise ValueError(
            "model.policy.lora needs the package peft; pip install 'tre-lightning[lora]'"
        ) from error
    named = f"model.policy.lora.target_modules={args.target_modules}"
    head = model.get_output_embeddings()
    targets = args.target_modules
    if targets == "all-linear":  # peft's own would name experts and routers of other forms too
        targets = [
            name
            for name, layer in model.named_modules()
            if type(layer) in _LINEAR and layer is not head
        ]
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        # Layers of gpt2 keep their weights transposed; peft would find out, with a warning.
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
    )
    try:
        # In a folder of its own, or peft would take names for those of an older transformers.
        inject_adapter_in_model(config, nn.ModuleDict({"model": model}), _ADAPTER)
    except ValueError as error:
        raise ValueError(f"{named} does not fit the model: {error}") from error
    # The embedding shares its weights with the head in many models; a router may be more than a
    # linear layer.
    others = [
        layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        and not (isinstance(layer, Linear) and type(layer.get_base_layer()) in _LINEAR)
    ]
    if others or model.get_output_embeddings() is not head:
        raise ValueError(f"{named} names the head or a layer that is not linear; leave it out")
    numbers = generator(*key)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # peft gives the adapters the type of the frozen weights, and numbers of its own.
        parameter.data = parameter.data.to(torch.get_default_dtype())
        if ".lora_A." in name:
            start = torch.empty_like(parameter, device="cpu", requires_grad=False)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=numbers)
            parameter.data.copy_(start)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The frozen model without its adapters, for a forward pass without gradients."""
    layers = [layer for _, layer in _adapted(model)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the equivalent plain model, adapters merged, by the plain model's names.

    A merged weight has the type of the frozen one: in bfloat16 it is rounded to that. The model
    stays as it is.
    """
    merged = dict(model.state_dict())
    for name, layer in _adapted(model):
        for key in layer.state_dict():
            del merged[f"{name}.{key}"]
        base = layer.get_base_layer()
        merged |= {f"{name}.{key}": value for key, value in base.state_dict().items()}
        weight = cast(Tensor, base.weight)
        changed = weight + layer.get_delta_weight(_ADAPTER)
        merged[f"{name}.weight"] = changed.to("cpu", weight.dtype)
    return merged


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters of :func:`add_adapters`."""
    return any(name.endswith(".lora_A") for name, _ in model.named_modules())


def _adapted(model: nn.Module) -> "list[tuple[str, Linear]]":
    from peft.tuners.lora import Linear

    return [(name, part) for name, part in model.named_modules() if isinstance(part, Linear)]


def frozen_names(module: nn.Module) -> set[str]:
    """Names of the frozen parameters, every name of a shared one."""
    named = module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def fingerprint(module: nn.Module) -> str:
    """Hash of the first numbers of every frozen parameter, to recognise other weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            start = parameter.detach().flatten()[:_SAMPLED].cpu().contiguous()
            digest.update(name.encode())
            digest.update(start.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
