"""The type of new tensors, which is not that of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_or_better() -> Iterator[None]:
    """New tensors are float32, where a trainer of half precision would make them bfloat16.

    Scores, counts, coefficients and whatever else becomes a tensor in a step keep their digits; the
    weights, and what the model makes of them, keep their type.
    """
    before = torch.get_default_dtype()
    if before in (torch.bfloat16, torch.float16):
        torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
