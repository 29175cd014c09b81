"""Tasks: prompts, scorers and demonstrations."""

from typing import TYPE_CHECKING

from tre_lightning.common.lazy import lazy_names

if TYPE_CHECKING:
    from tre_lightning.tasks.alignment.pairs import PreferencePairs
    from tre_lightning.tasks.alignment.prompts import PreferenceDataModule
    from tre_lightning.tasks.base import Prompt, PromptDataModule
    from tre_lightning.tasks.countdown.prompts import CountdownDataModule
    from tre_lightning.tasks.countdown.puzzles import PuzzleSpec
    from tre_lightning.tasks.demonstrations import Demonstrations
    from tre_lightning.tasks.mathematics.arithmetic import ArithmeticSpec
    from tre_lightning.tasks.mathematics.gsm8k import GSM8KDataModule
    from tre_lightning.tasks.mathematics.prompts import MathDataModule
    from tre_lightning.tasks.walks.prompts import WalkDataModule, WalkSpec
    from tre_lightning.tasks.word_problems.problems import WordProblemSpec
    from tre_lightning.tasks.word_problems.prompts import WordProblemsDataModule

__all__ = [
    "ArithmeticSpec",
    "CountdownDataModule",
    "Demonstrations",
    "GSM8KDataModule",
    "MathDataModule",
    "PreferenceDataModule",
    "PreferencePairs",
    "Prompt",
    "PromptDataModule",
    "PuzzleSpec",
    "WalkDataModule",
    "WalkSpec",
    "WordProblemSpec",
    "WordProblemsDataModule",
]

__getattr__ = lazy_names(
    {
        "ArithmeticSpec": "tre_lightning.tasks.mathematics.arithmetic",
        "CountdownDataModule": "tre_lightning.tasks.countdown.prompts",
        "Demonstrations": "tre_lightning.tasks.demonstrations",
        "GSM8KDataModule": "tre_lightning.tasks.mathematics.gsm8k",
        "MathDataModule": "tre_lightning.tasks.mathematics.prompts",
        "PreferenceDataModule": "tre_lightning.tasks.alignment.prompts",
        "PreferencePairs": "tre_lightning.tasks.alignment.pairs",
        "Prompt": "tre_lightning.tasks.base",
        "PromptDataModule": "tre_lightning.tasks.base",
        "PuzzleSpec": "tre_lightning.tasks.countdown.puzzles",
        "WalkDataModule": "tre_lightning.tasks.walks.prompts",
        "WalkSpec": "tre_lightning.tasks.walks.prompts",
        "WordProblemSpec": "tre_lightning.tasks.word_problems.problems",
        "WordProblemsDataModule": "tre_lightning.tasks.word_problems.prompts",
    }
)
