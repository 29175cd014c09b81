"""Tasks: prompts, scorers and demonstrations."""

from tre_lightning.data.arithmetic import ArithmeticSpec
from tre_lightning.data.countdown import CountdownDataModule
from tre_lightning.data.demonstrations import Demonstrations
from tre_lightning.data.math import MathDataModule
from tre_lightning.data.prompts import Prompt, PromptDataModule
from tre_lightning.data.puzzles import PuzzleSpec
from tre_lightning.data.walks import WalkDataModule, WalkSpec

__all__ = [
    "ArithmeticSpec",
    "CountdownDataModule",
    "Demonstrations",
    "MathDataModule",
    "Prompt",
    "PromptDataModule",
    "PuzzleSpec",
    "WalkDataModule",
    "WalkSpec",
]
