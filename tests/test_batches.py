"""How rows are cut into batches, and batches into ranks' shares."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tre_lightning.tasks.batching import share, spans


@pytest.mark.parametrize(
    ("count", "size", "ranks", "expected"),
    [
        (10, 4, 1, [(0, 4), (4, 8), (8, 10)]),
        (9, 4, 2, [(0, 4), (4, 9)]),  # one row is too few for two ranks
        (8, 4, 2, [(0, 4), (4, 8)]),
        (5, 1, 2, [(0, 2), (2, 5)]),  # a batch has a row for each rank
        (2, 8, 2, [(0, 2)]),
    ],
)
def test_spans(count: int, size: int, ranks: int, expected: list[tuple[int, int]]) -> None:
    assert spans(count, size, ranks) == expected


def test_fraction() -> None:
    assert [share(7, rank, 3) for rank in range(3)] == [(0, 2), (2, 4), (4, 7)]


@given(st.integers(1, 6), st.integers(0, 60), st.integers(1, 20))
def test_every_row_once_and_every_rank_in_every_batch(ranks: int, more: int, size: int) -> None:
    count = ranks + more
    rows = []
    for start, stop in spans(count, size, ranks):
        for rank in range(ranks):
            first, end = share(stop - start, rank, ranks)
            assert first < end
            rows += range(start + first, start + end)
    assert rows == list(range(count))
