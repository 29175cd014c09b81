"""Exact scorer of word problems: the last number of a response, which may not try out others."""

from collections.abc import Sequence

from tre_lightning.tasks.numbers import numbers_in


def score_word_problem(response: str, numbers: Sequence[int], answer: int, steps: int) -> float:
    """1.0 for a right response, else 0.0, in linear time for any response.

    A response is right if its last number is the answer, by value, and it holds no more numbers
    than a solution needs: besides those of the question at most one different number a step. So
    ``The answer is 8.`` and ``6 + 2 = 8`` are right, and a list of numbers that ends at the answer
    is not. :mod:`tre_lightning.tasks.numbers` says what a number is; a sum that is not done, as
    ``4 + 4``, has no result.

    Args:
        response: hostile text; nothing in it is evaluated.
        numbers: those of the question.
        answer: none of them.
        steps: sums, differences and products that lead to the answer.
    """
    written = numbers_in(response)
    if not written or written[-1].operand or written[-1].value != answer:
        return 0.0
    new = {number.text if number.value is None else number.value for number in written}
    return float(len(new.difference(numbers)) <= steps)
