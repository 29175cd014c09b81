"""The default dtype of new tensors, apart from the dtype of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_or_better() -> Iterator[None]:
    """Context in which new tensors are float32 even under ``bf16-true``.

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
