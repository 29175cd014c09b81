"""Log-probabilities, entropies and regions of logits, and the gradient with respect to them."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from tre_lightning.entropy import Region
from tre_lightning.ops import torch_rows
from tre_lightning.ops.region import RegionRows, as_computed, find


class Scan(NamedTuple):
    """Results of one scan of the logits, for N rows."""

    logprobs: Tensor  # [N], of the labels
    log_norm: Tensor  # [N], logsumexp of the logits
    full_entropy: Tensor  # [N], over the whole vocabulary, nats
    regions: tuple[RegionRows, ...]


def scan(logits: Tensor, labels: Tensor, regions: Sequence[Region], temperature: float) -> Scan:
    """Log-probabilities, entropies and regions of ``logits / temperature``.

    Args:
        logits: ``[N, V]``, contiguous, any float dtype.
        labels: ``[N]`` token ids in [0, V).
        regions: the regions whose entropies are wanted.
        temperature: > 0.
    """
    backend = _backend(logits)
    summary = backend.summarise(logits, temperature)
    chosen = as_computed(logits.gather(1, labels.unsqueeze(1)), temperature).squeeze(1)
    parts = tuple(find(logits, temperature, summary, region, backend.read) for region in regions)
    return Scan(chosen - summary.log_norm, summary.log_norm, summary.entropy, parts)


def d_logits(
    logits: Tensor,
    labels: Tensor,
    result: Scan,
    d_logprobs: Tensor | None,
    d_entropies: Sequence[Tensor | None],
    temperature: float,
    out: Tensor,
) -> Tensor:
    """Write the gradient with respect to the logits to ``out`` (``logits`` itself is allowed).

    d logprob / dx_j = [j = label] - p_j, and inside a region of mass m and entropy H
    dH / dx_j = -p_j / m * (x_j - log_norm - log m + H).

    Args:
        logits: as given to :func:`scan`.
        labels: as given to :func:`scan`.
        result: what it gave.
        d_logprobs: derivative of the loss by each log-probability, ``[N]``; None = 0.
        d_entropies: derivative of the loss by the entropy of each region, ``[N]``; None = 0.
        temperature: as given to :func:`scan`.
        out: ``[N, V]``, of the dtype of the logits.
    """
    norm = result.log_norm.unsqueeze(1)
    slope_p = torch.zeros_like(result.log_norm) if d_logprobs is None else d_logprobs / temperature
    ids, at_ids = [labels.unsqueeze(1)], [slope_p.unsqueeze(1)]
    wide = []
    for region, d in zip(result.regions, d_entropies, strict=True):
        if d is None:
            continue
        slope = -d / temperature / region.mass
        level = region.entropy - region.mass.log() - result.log_norm
        x = as_computed(logits.gather(1, region.ids), temperature)
        at = slope.unsqueeze(1) * (x - norm).exp_() * (x + level.unsqueeze(1))
        ids.append(region.ids)
        at_ids.append(at.masked_fill_(~region.listed(), 0.0))
        if region.wide.any():
            wide.append((region, slope, level))
    _backend(logits).gradient(
        logits,
        temperature,
        result.log_norm,
        torch.cat(ids, 1),
        torch.cat(at_ids, 1),
        -slope_p,
        wide,
        out,
    )
    return out


def _backend(logits: Tensor) -> ModuleType:
    """Triton's kernels on a CUDA device that they can run on; else plain torch."""
    if logits.is_cuda and _has_triton(logits.device):
        return import_module("tre_lightning.ops.triton_rows")
    return torch_rows


def _has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and supports the device: from Ampere (capability 8.0) on."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
