r"""The comparison of math-verify (Hugging Face), as verl's ``math_verify`` reward has it.

It takes more answers than ours, and some that are wrong (tre_lightning.tasks.mathematics.scorer
names three). It evaluates what it reads, so it runs in a worker alone.
"""


def verified_in_worker(gold: str, answer: str) -> bool:
    """Whether math-verify takes the answer for the gold; may take forever."""
    from math_verify import (  # type: ignore[import-untyped]
        ExprExtractionConfig,
        LatexExtractionConfig,
        parse,
        verify,
    )

    latex = LatexExtractionConfig()
    golds = parse(f"\\boxed{{{gold}}}", [latex], parsing_timeout=None)
    answers = parse(f"\\boxed{{{answer}}}", [ExprExtractionConfig(), latex], parsing_timeout=None)
    return bool(verify(golds, answers, timeout_seconds=None))
