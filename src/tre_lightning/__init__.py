"""Trust Region Entropy for reinforcement learning of language models, on PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tre_lightning.cli.main import main
    from tre_lightning.entropy import Region, trust_region_entropy, trust_region_mask
    from tre_lightning.methods import LossTerm, Method
    from tre_lightning.ops import fused_linear_logprobs_and_entropy
    from tre_lightning.tasks import PromptDataModule
    from tre_lightning.training.ppo import PPOModule

__version__ = "0.1.0"

__all__ = [
    "LossTerm",
    "Method",
    "PPOModule",
    "PromptDataModule",
    "Region",
    "__version__",
    "fused_linear_logprobs_and_entropy",
    "main",
    "trust_region_entropy",
    "trust_region_mask",
]

# Read at first use: a scorer's worker process needs none of torch, Lightning and transformers.
_ROOMS = {
    "LossTerm": "methods",
    "Method": "methods",
    "PPOModule": "training.ppo",
    "PromptDataModule": "tasks",
    "Region": "entropy",
    "fused_linear_logprobs_and_entropy": "ops",
    "main": "cli.main",
    "trust_region_entropy": "entropy",
    "trust_region_mask": "entropy",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
