"""Splits and random draws of generated tasks, the same in every version of Python."""

import random
from collections.abc import Sequence
from typing import TypeVar

SPLITS = ("train", "val", "test")
MAX_DRAWS = 10_000  # until one belongs to the split that is wanted

Option = TypeVar("Option")


def split_of_hash(number: int) -> str:
    """The split (train 80 %, val 10 %, test 10 %) of an item by its hash."""
    bucket = number % 10
    return "train" if bucket < 8 else SPLITS[bucket - 7]


def below(rng: random.Random, n: int) -> int:
    """An int from 0 to n - 1."""
    # random() is the one method whose sequence Python promises to keep across versions.
    return int(rng.random() * n)


def between(rng: random.Random, bounds: tuple[int, int]) -> int:
    """An int from the first to the second bound, both included."""
    return bounds[0] + below(rng, bounds[1] - bounds[0] + 1)


def pick(rng: random.Random, options: Sequence[Option]) -> Option:
    """One of the options."""
    return options[below(rng, len(options))]
