"""Weights, gradients and AdamW's moments sharded over all ranks: FSDP2 under Lightning's strategy.

Every decoder layer is one group of weights that ranks gather and free together; all that is left
(embeddings, head, value head) is the group of the whole model. A group is gathered while its module
runs, so every rank must run its modules equally often. Sampling is exempt: there each rank holds
the whole policy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer


def shards(trainer: Trainer) -> bool:
    """Whether the trainer's strategy shards the model."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def check_sharding(trainer: Trainer, *, adapters: bool, cpu_offload: bool = False) -> None:
    """Refuse a sharding strategy, or options of it, that would not work.

    Args:
        trainer: the configured trainer.
        adapters: the run trains adapters.
        cpu_offload: shards are to stay in host memory.

    Raises:
        ValueError: naming the field and the fix.
    """
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"trainer.strategy={type(strategy).__name__} is not one that this project knows; for "
            "sharded weights give --config configs/scale/8gpu.yaml (ModelParallelStrategy)"
        )
    if not isinstance(strategy, ModelParallelStrategy):
        if cpu_offload:
            raise ValueError(
                "model.policy.cpu_offload=true needs a strategy that shards, not "
                f"{type(strategy).__name__}; put --config configs/memory/cpu_offload.yaml after "
                "all others, or leave it out"
            )
        return
    backend = strategy.process_group_backend
    if cpu_offload and strategy.root_device.type == "cuda" and "cpu:gloo" not in (backend or ""):
        raise ValueError(
            f"trainer.strategy.init_args.process_group_backend={backend} cannot add up gradient "
            "norms in host memory (model.policy.cpu_offload=true); set it to cpu:gloo,cuda:nccl"
        )
    if strategy._save_distributed_checkpoint:
        raise ValueError(
            "trainer.strategy.init_args.save_distributed_checkpoint=true would write a directory "
            "instead of a checkpoint file; set it to false"
        )
    if strategy._tensor_parallel_size not in ("auto", 1):
        raise ValueError(
            f"trainer.strategy.init_args.tensor_parallel_size={strategy._tensor_parallel_size} is "
            "not used here: weights are sharded over all devices; set it to 1"
        )
    if adapters:
        raise ValueError(
            "model.policy.lora keeps the frozen weights whole on every device, which "
            "ModelParallelStrategy does not; give trainer.strategy ddp, or leave the adapters out"
        )


def check_whole(trainer: Trainer) -> None:
    """Refuse sharding strategies for training that does not support them.

    Raises:
        ValueError: naming the field and the fix.
    """
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ValueError(
            f"trainer.strategy={type(strategy).__name__} shards the model, which only "
            "reinforcement learning can do here; give trainer.strategy ddp, or one device"
        )


def shard(
    model: nn.Module,
    device_type: str,
    precision: str,
    *methods: str,
    cpu_offload: bool = False,
) -> None:
    """Shard a model in place over all ranks.

    Args:
        model: with whole weights, equal on all ranks; they are moved to the device group by group.
        device_type: cuda or cpu.
        precision: that of the trainer. With bf16-mixed, weights are gathered in bfloat16, half the
            memory and traffic; the shards, and so the optimiser's, stay float32, and so does the
            sum of the gradients over the ranks.
        methods: names of methods that need the model's weights as ``forward`` does. Their arguments
            are not cast.
        cpu_offload: the shards stay in host memory, and so do gradients and the optimiser's states.
    """
    mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    elif precision == "bf16-true":
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    place = CPUOffloadPolicy(pin_memory=device_type == "cuda") if cpu_offload else OffloadPolicy()
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    # What the model itself is given are token ids, and records whose numbers keep their types.
    uncast = replace(policy, cast_forward_inputs=False)
    for part in (*layers, model):
        # The last group too, which by default stays gathered until a backward pass: what looks at
        # the parameters between two passes (optimiser, checkpoint) must find the shards.
        fully_shard(
            part,
            mesh=mesh,
            mp_policy=uncast if part is model else policy,
            offload_policy=place,
            reshard_after_forward=True,
        )
    for method in methods:
        register_fsdp_forward_method(model, method)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model was sharded by :func:`shard`."""
    return isinstance(model, FSDPModule)


@contextmanager
def no_inference_mode() -> Iterator[None]:
    """Context without gradients that leaves the inference mode in which Lightning validates.

    The tensors that are made for gathered weights are used again, and by the update.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def gathered_layers(model: nn.Module) -> Iterator[None]:
    """Context in which all layers are whole on this rank, so that it may run alone.

    Without gradients. All ranks must enter together; a model that is not sharded stays as it is.
    """
    layers = [part for part in model.modules() if isinstance(part, FSDPModule)]
    try:
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all ranks. Collective if it is sharded: call on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU of rank 0, none elsewhere. Collective: call on all ranks.

    A weight of two names (tied embeddings) has the first one.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    first = {name for name, _ in model.named_parameters()}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name not in first:
            weights.pop(name, None)
    return weights
