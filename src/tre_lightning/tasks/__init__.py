"""Tasks: prompts, scorers and demonstrations."""

from tre_lightning.tasks.alignment.pairs import PreferencePairs
from tre_lightning.tasks.alignment.prompts import PreferenceDataModule
from tre_lightning.tasks.base import Prompt, PromptDataModule
from tre_lightning.tasks.countdown.prompts import CountdownDataModule
from tre_lightning.tasks.countdown.puzzles import PuzzleSpec
from tre_lightning.tasks.demonstrations import Demonstrations
from tre_lightning.tasks.mathematics.arithmetic import ArithmeticSpec
from tre_lightning.tasks.mathematics.prompts import MathDataModule
from tre_lightning.tasks.walks.prompts import WalkDataModule, WalkSpec

__all__ = [
    "ArithmeticSpec",
    "CountdownDataModule",
    "Demonstrations",
    "MathDataModule",
    "PreferenceDataModule",
    "PreferencePairs",
    "Prompt",
    "PromptDataModule",
    "PuzzleSpec",
    "WalkDataModule",
    "WalkSpec",
]
