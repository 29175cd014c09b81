"""Trust Region Entropy for reinforcement learning of language models, on PyTorch Lightning."""

__version__ = "0.1.0"
