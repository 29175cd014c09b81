"""Tasks: prompts, scorers and demonstrations."""

from tre_lightning.data.countdown import CountdownDataModule
from tre_lightning.data.demonstrations import Demonstrations
from tre_lightning.data.prompts import Prompt, PromptDataModule
from tre_lightning.data.puzzles import PuzzleSpec

__all__ = ["CountdownDataModule", "Demonstrations", "Prompt", "PromptDataModule", "PuzzleSpec"]
