"""Rollout engines: samplers of responses with one small interface."""

from tre_lightning.sampling.base import Recorder, RolloutEngine, Sampling
from tre_lightning.sampling.continuous_batching import ContinuousBatching, check_continuous_batching
from tre_lightning.sampling.in_process import InProcess
from tre_lightning.sampling.options import RolloutArgs
from tre_lightning.sampling.vllm import VLLM, check_vllm

__all__ = [
    "VLLM",
    "ContinuousBatching",
    "InProcess",
    "Recorder",
    "RolloutEngine",
    "Sampling",
    "check_engine",
    "make_engine",
]


def make_engine(args: RolloutArgs) -> RolloutEngine:
    """The engine that the options name, not started yet."""
    if args.engine == "vllm":
        return VLLM(args.vllm)
    return ContinuousBatching() if args.engine == "continuous_batching" else InProcess()


def check_engine(args: RolloutArgs, device: str, *, sharded: bool = False) -> None:
    """Refuse an engine that cannot work, without starting it.

    Args:
        args: which engine.
        device: what it would run on: cpu, cuda.
        sharded: whether a device holds a part of the model only.

    Raises:
        ValueError: naming the field, its value and the fix.
    """
    if args.engine == "continuous_batching":
        check_continuous_batching(sharded)
    if args.engine == "vllm":
        check_vllm()
        if device != "cuda":
            raise ValueError(
                f"model.rollout.engine=vllm needs a CUDA GPU, not {device}; use in_process or "
                "continuous_batching"
            )
