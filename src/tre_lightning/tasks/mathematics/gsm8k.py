"""GSM8K: grade-school word problems in English, graded by the last number of a response.

The rows are those of ``openai/gsm8k``: ``question``, and ``answer``, a worked solution that ends
with ``#### 42``. Everything else is as for MATH.
"""

from typing import Any

from tre_lightning.tasks.mathematics.prompts import AnswerIn, MathDataModule

HUB = "openai/gsm8k"


class GSM8KDataModule(MathDataModule):
    """GSM8K of the hub, or files of its form; worked solutions serve as demonstrations."""

    def __init__(
        self,
        train_file: str | None = HUB,
        eval_file: str | None = HUB,
        train_name: str | None = "main",
        eval_name: str | None = "main",
        answer_in: AnswerIn = "number",
        **kwargs: Any,
    ) -> None:
        r"""Keep the options.

        Args:
            train_file: a .jsonl or .parquet file to train on, or the name of a dataset of the hub.
            eval_file: the same for validation and, without ``test_file``, the test.
            train_name: configuration of ``train_file`` where it is a dataset of the hub.
            eval_name: configuration of ``eval_file``.
            answer_in: what of a response is graded: its last closed ``\boxed{}``, what stands
                behind its last ``####``, or its last number.
            kwargs: options of :class:`MathDataModule`.
        """
        super().__init__(
            train_file=train_file,
            eval_file=eval_file,
            train_name=train_name,
            eval_name=eval_name,
            answer_in=answer_in,
            **kwargs,
        )
