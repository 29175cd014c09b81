"""Trust Region Entropy for reinforcement learning of language models, on PyTorch Lightning."""

from typing import TYPE_CHECKING

from tre_lightning.common.lazy import lazy_names

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

__getattr__ = lazy_names(
    {
        "LossTerm": "tre_lightning.methods",
        "Method": "tre_lightning.methods",
        "PPOModule": "tre_lightning.training.ppo",
        "PromptDataModule": "tre_lightning.tasks",
        "Region": "tre_lightning.entropy",
        "fused_linear_logprobs_and_entropy": "tre_lightning.ops",
        "main": "tre_lightning.cli.main",
        "trust_region_entropy": "tre_lightning.entropy",
        "trust_region_mask": "tre_lightning.entropy",
    }
)


def __dir__() -> list[str]:
    return __all__
