"""A scorer that the tests of its rules share."""

from collections.abc import Iterator

import pytest

from tre_lightning.tasks.mathematics.scorer import MathScorer


@pytest.fixture(scope="module")
def scorer() -> Iterator[MathScorer]:
    with MathScorer(workers=1, timeout=30.0) as scorer:  # a busy machine must change no score
        yield scorer
