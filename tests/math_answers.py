"""Answers in boxes, for the tests of the MATH scorer."""

from tre_lightning.tasks.mathematics.scorer import MathScorer


def score(scorer: MathScorer, gold: str, answer: str) -> float:
    return scorer.score([f"So it is $\\boxed{{{answer}}}$."], [gold])[0]
