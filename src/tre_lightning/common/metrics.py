"""Metrics of a run: masked means, explained variance, pass@k, majority@k and standard errors.

The metrics keep sums in float64 and counts in int64, reduced over devices, so a value does not
depend on how the data was cut into updates or spread over ranks. A metric that has counted nothing
computes NaN.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

_CONSTANT = 1e-6  # relative spread up to which returns are a constant plus float32 rounding


def cumulative_tail_risk(tail_mass: Tensor, response_mask: Tensor) -> Tensor:
    """Probability that a response has at least one tail token: 1 - prod_t (1 - tail_t).

    For a constant tail this is 1 - (1 - tail)^T (cumulative tail risk, arXiv 2602.03635).

    Args:
        tail_mass: probability outside the region at each token, clamped to [0, 1], ``[B, T]``.
        response_mask: bool, True = counts, ``[B, T]``; ``tail_mass`` may be NaN elsewhere.

    Returns:
        Risk in [0, 1], ``[B]``, 0 for a response without counted tokens; float64 if ``tail_mass``
        is, else float32.

    Raises:
        ValueError: if the mask is not bool or its shape differs.
    """
    _check_mask("response_mask", response_mask, "tail_mass", tail_mass)
    tail = torch.where(response_mask, tail_mass.double(), 0.0)
    return like(_any_of(tail), tail_mass)


def pass_at_k(num_correct: Tensor, num_samples: int, k: int) -> Tensor:
    """Unbiased pass@k, 1 - C(n - c, k) / C(n, k) for c correct of n responses.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1.

    Args:
        num_correct: c of each prompt, whole numbers in [0, ``num_samples``], any shape.
        num_samples: n, responses sampled for every prompt.
        k: responses drawn without replacement.

    Returns:
        Probability that at least one of the k is correct, shape of ``num_correct``; float64 if
        ``num_correct`` is, else float32.

    Raises:
        ValueError: unless 1 <= k <= ``num_samples`` and 0 <= ``num_correct`` <= ``num_samples``.
    """
    _check_k(k)
    if k > num_samples:
        raise ValueError(f"k={k} exceeds num_samples={num_samples}; sample at least k responses")
    if not ((num_correct >= 0) & (num_correct <= num_samples)).all():
        raise ValueError(
            f"num_correct spans {num_correct.min().item()} to {num_correct.max().item()}; "
            f"pass counts in [0, num_samples={num_samples}]"
        )
    correct = num_correct.double()
    return like(_pass_at_k(correct, torch.full_like(correct, num_samples), k), num_correct)


def pass_at_k_by_prompt(scores: Tensor, k: int) -> Tensor:
    """Unbiased pass@k of each prompt over its scored responses; see :func:`pass_at_k`.

    A score >= 1.0 is correct. A NaN score ("could not be scored") is left out, so that prompt's n
    is smaller.

    Args:
        scores: bool or score of each response, ``[G, n]``, n >= k.
        k: responses drawn without replacement.

    Returns:
        pass@k, ``[G]`` float64; NaN where fewer than k responses are scored.

    Raises:
        ValueError: if k < 1, ``scores`` is not ``[G, n]`` or n < k.
    """
    _check_k(k)
    _check_grouped("scores", scores)
    if scores.shape[1] < k:
        raise ValueError(
            f"scores has {scores.shape[1]} responses per prompt; pass@{k} needs at least {k}"
        )
    scored = (~scores.isnan()).sum(dim=1)
    values = _pass_at_k((scores >= 1).sum(dim=1), scored.clamp(min=k), k)
    return torch.where(scored >= k, values, torch.nan)


def majority_by_prompt(scores: Tensor, answers: Tensor) -> Tensor:
    """Score of each prompt's most frequent answer.

    Every scored response with an answer has one vote. The score of an answer is the mean score of
    the responses that gave it. Between answers of as many votes one is chosen at random: the value
    is the expectation, the mean of their scores.

    Source: Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning", sec. 2.

    Args:
        scores: score of each response, NaN = could not be scored, ``[G, n]``.
        answers: int64, equal for equal answers of a prompt, negative = no answer, ``[G, n]``; see
            :func:`number_answers`.

    Returns:
        Score of the most frequent answer, ``[G]`` float64; 0 where no scored response has an
        answer; NaN where no response is scored.

    Raises:
        ValueError: if the shapes differ or ``scores`` is not ``[G, n]``.
    """
    _check_grouped("scores", scores)
    check_shape("answers", answers, "scores", scores)
    scored = ~scores.isnan()
    votes = scored & (answers >= 0)
    agree = answers.unsqueeze(1) == answers.unsqueeze(2)
    support = (agree & votes.unsqueeze(1)).sum(dim=2).masked_fill(~votes, 0)
    # Tied answers have as many responses each: the mean over all of them is the mean over answers.
    most = votes & (support == support.amax(dim=1, keepdim=True))
    total = torch.where(most, scores.double(), 0.0).sum(dim=1)
    return torch.where(scored.any(dim=1), total / most.sum(dim=1).clamp(min=1), torch.nan)


def number_answers(answers: Sequence[Hashable | None], num_responses: int) -> Tensor:
    """Answers as numbers that :func:`majority_by_prompt` can compare.

    Args:
        answers: answer of each response, None = it gives none, those of one prompt side by side.
        num_responses: n, responses of each prompt.

    Returns:
        int64 ``[G, n]``: -1 for no answer, else the place of the answer among its prompt's.

    Raises:
        ValueError: if the number of answers is no multiple of n.
    """
    if len(answers) % num_responses:
        raise ValueError(
            f"{len(answers)} answers are no multiple of num_responses={num_responses}; pass one "
            "for each response"
        )
    rows: list[list[int]] = []
    for start in range(0, len(answers), num_responses):
        places: dict[Hashable, int] = {}
        row = answers[start : start + num_responses]
        rows.append([-1 if a is None else places.setdefault(a, len(places)) for a in row])
    return torch.tensor(rows, dtype=torch.int64).view(-1, num_responses)


class _Float64Metric(Metric):
    """A metric whose states keep their dtype when the module is cast.

    ``Module.to(torch.bfloat16)``, as Lightning's "bf16-true" does, would turn torchmetrics' states
    into bfloat16, and a sum would stop growing after a few hundred tokens.
    """

    is_differentiable = False
    full_state_update = False

    # Any, as in torchmetrics' own signature: the functions nn.Module passes are untyped
    def _apply(self, fn: Callable[..., Any], exclude_state: Any = "") -> Any:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)

    def _add_sum(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")


class _RunningMean(_Float64Metric):
    """Total over count."""

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("total")
        self._add_sum("count", torch.int64)

    def compute(self) -> Tensor:
        """Mean of everything counted so far, a float64 scalar; NaN if nothing was."""
        return self.total / self.count

    def _count(self, values: Tensor) -> None:
        """Count the values that are not NaN."""
        counted = values[~values.isnan()].double()
        self.total = self.total + counted.sum()
        self.count = self.count + counted.numel()


class MaskedMean(_RunningMean):
    """Mean over the True entries of a mask, over all updates and devices.

    Example: the clip fraction of an epoch is a ``MaskedMean`` of
    :func:`tre_lightning.training.losses.clipped`.
    """

    def update(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Count the entries of ``values`` where ``mask`` is True; all of them without a mask.

        Args:
            values: numbers or bools, any shape; may be NaN or infinite outside the mask.
            mask: bool, True = counts, same shape.

        Raises:
            ValueError: if the mask is not bool or its shape differs.
        """
        if mask is None:
            mask = torch.ones_like(values, dtype=torch.bool)
        _check_mask("mask", mask, "values", values)
        self.total = self.total + torch.where(mask, values.detach().double(), 0.0).sum()
        self.count = self.count + mask.sum()


class Total(_Float64Metric):
    """Sum over all updates and devices."""

    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("total")

    def update(self, values: Tensor | float) -> None:
        """Add a number, or all of a tensor's."""
        self.total = self.total + torch.as_tensor(values, dtype=torch.float64).detach().sum()

    def compute(self) -> Tensor:
        """The sum so far, a float64 scalar."""
        return self.total


class Maximum(_Float64Metric):
    """Largest value of all updates and devices; NaN is left out."""

    largest: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        infinity = torch.tensor(-torch.inf, dtype=torch.float64)
        self.add_state("largest", infinity, dist_reduce_fx="max")

    def update(self, values: Tensor) -> None:
        """Count values of any shape."""
        counted = values.detach().double().nan_to_num(-torch.inf, torch.inf, -torch.inf).flatten()
        self.largest = torch.cat([self.largest.view(1), counted]).max()

    def compute(self) -> Tensor:
        """The largest so far, a float64 scalar; -inf if nothing was counted."""
        return self.largest


class PassAtK(_RunningMean):
    """Mean unbiased pass@k over prompts; see :func:`pass_at_k`.

    Args:
        k: responses drawn without replacement, >= 1.
        kwargs: options of ``torchmetrics.Metric``.

    Raises:
        ValueError: if k < 1.
    """

    higher_is_better = True

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_k(k)
        self.k = k

    def update(self, scores: Tensor) -> None:
        """Count G prompts with n responses each; n may differ between updates.

        Prompts with fewer than k scored responses are skipped; see :func:`pass_at_k_by_prompt`.

        Args:
            scores: bool or score of each response, NaN = could not be scored, ``[G, n]``, n >= k.

        Raises:
            ValueError: if ``scores`` is not ``[G, n]`` or n < k.
        """
        self._count(pass_at_k_by_prompt(scores, self.k))


class MajorityAtK(_RunningMean):
    """Mean score of the prompts' most frequent answers, k responses each.

    See :func:`majority_by_prompt`: responses without an answer do not vote, a prompt where nobody
    votes scores 0, and a tie counts the mean score of the tied answers, which is what a random
    choice between them would score on average.
    """

    higher_is_better = True

    def update(self, scores: Tensor, answers: Tensor) -> None:
        """Count G prompts with k responses each; prompts without a scored response are skipped.

        Args:
            scores: score of each response, NaN = could not be scored, ``[G, k]``.
            answers: int64, equal for equal answers of a prompt, negative = no answer, ``[G, k]``.

        Raises:
            ValueError: if the shapes differ or ``scores`` is not ``[G, k]``.
        """
        self._count(majority_by_prompt(scores, answers))


class StandardError(_Float64Metric):
    """Standard error of a mean over prompts: sd / sqrt(G), with G - 1 in the variance.

    Responses to one prompt are no independent draws. One value for each prompt, its mean over the
    responses, makes this the standard error clustered by prompt.

    Source: Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("count", torch.int64)
        self._add_sum("total")
        self._add_sum("squares")

    def update(self, values: Tensor) -> None:
        """Count the value of each of G prompts, ``[G]``; NaN is left out."""
        counted = values[~values.isnan()].double()
        self.count = self.count + counted.numel()
        self.total = self.total + counted.sum()
        self.squares = self.squares + counted.square().sum()

    def compute(self) -> Tensor:
        """Standard error so far, a float64 scalar; NaN for fewer than two prompts."""
        spread = (self.squares - self.total.square() / self.count).clamp(min=0)
        return (spread / (self.count - 1) / self.count).sqrt()


class MaskedExplainedVariance(_Float64Metric):
    """Explained variance of the returns by the values, 1 - Var(returns - values) / Var(returns).

    1 is a perfect critic (up to a constant), 0 one no better than a constant. NaN where the returns
    are constant (all within 1e-6 of the largest return or value, float32 rounding: returns are
    sums of values): torchmetrics' ExplainedVariance reports 0 or 1 there, and loses float32 returns
    far from 0 to rounding.
    """

    higher_is_better = True

    count: Tensor
    error_sum: Tensor
    error_squares: Tensor
    return_sum: Tensor
    return_squares: Tensor
    return_min: Tensor
    return_max: Tensor
    value_max: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("count", torch.int64)
        for name in ("error_sum", "error_squares", "return_sum", "return_squares"):
            self._add_sum(name)
        # rounding leaves the variance of a constant just off 0; its spread is exactly 0
        infinity = torch.tensor(torch.inf, dtype=torch.float64)
        self.add_state("return_min", infinity, dist_reduce_fx="min")
        self.add_state("return_max", -infinity, dist_reduce_fx="max")
        self.add_state("value_max", -infinity, dist_reduce_fx="max")

    def update(self, values: Tensor, returns: Tensor, mask: Tensor) -> None:
        """Count the tokens where ``mask`` is True.

        Args:
            values: the critic's predictions, ``[B, T]``.
            returns: what they predict, ``[B, T]``.
            mask: bool, True = counts, ``[B, T]``; the others may be NaN elsewhere.

        Raises:
            ValueError: if the mask is not bool or the shapes differ.
        """
        check_shape("returns", returns, "values", values)
        _check_mask("mask", mask, "values", values)
        target = returns.detach()[mask].double()
        if target.numel() == 0:
            return
        predicted = values.detach()[mask].double()
        error = target - predicted
        self.count = self.count + target.numel()
        self.error_sum = self.error_sum + error.sum()
        self.error_squares = self.error_squares + error.square().sum()
        self.return_sum = self.return_sum + target.sum()
        self.return_squares = self.return_squares + target.square().sum()
        self.return_min = torch.minimum(self.return_min, target.min())
        self.return_max = torch.maximum(self.return_max, target.max())
        self.value_max = torch.maximum(self.value_max, predicted.abs().max())

    def compute(self) -> Tensor:
        """Explained variance so far, a float64 scalar <= 1; NaN if empty or returns constant."""
        magnitude = torch.maximum(self.return_min.abs(), self.return_max.abs())
        magnitude = torch.maximum(magnitude, self.value_max)
        varies = self.return_max - self.return_min > _CONSTANT * magnitude
        unexplained = self._variance(self.error_sum, self.error_squares)
        variance = self._variance(self.return_sum, self.return_squares)
        return torch.where(varies & (variance > 0), 1 - unexplained / variance, torch.nan)

    def _variance(self, total: Tensor, squares: Tensor) -> Tensor:
        return (squares / self.count - (total / self.count).square()).clamp(min=0)


def _any_of(probability: Tensor) -> Tensor:
    """1 - prod(1 - p) over the last axis; log1p and expm1 keep small p exact, p = 1 gives 1."""
    return -torch.expm1(torch.log1p(-probability.clamp(0, 1)).sum(dim=-1))


def _pass_at_k(num_correct: Tensor, num_samples: Tensor, k: int) -> Tensor:
    """pass@k in float64 with n per prompt, n >= k: C(n-c, k) / C(n, k) = prod_j<k 1 - c / (n-j)."""
    drawn = torch.arange(k, device=num_correct.device)
    # where c > n - k some factor is <= 0: clamped, it makes the result exactly 1
    return _any_of(num_correct.double().unsqueeze(-1) / (num_samples.unsqueeze(-1) - drawn))


def like(result: Tensor, *inputs: Tensor) -> Tensor:
    """The result in float64 if an input is, else in float32."""
    return result if any(x.dtype == torch.float64 for x in inputs) else result.float()


def _check_grouped(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 2:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; pass [prompts, responses]")


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k} draws no response; pass k >= 1")


def check_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors have one shape."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; pass {list(other.shape)}, as {other_name} has"
        )


def _check_mask(name: str, mask: Tensor, other_name: str, other: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} is {mask.dtype}; pass torch.bool (True = counts)")
    check_shape(name, mask, other_name, other)


def centred(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Distance from the mean over the True entries along the last axis, and their number.

    Exactly 0 where these are equal, whatever they are: dividing by their spread would blow up a
    rounding.

    Args:
        values: ``[..., n]``; NaN where the mask is False does not count.
        mask: bool, ``[..., n]``.

    Returns:
        The distance, ``[..., n]`` float64, 0 outside the mask; the number, ``[..., 1]``.
    """
    count = mask.sum(-1, keepdim=True)
    if not mask.numel():
        return values.double(), count
    wide = torch.where(mask, values, 0.0).double()
    # From one of them first: the mean of equal numbers may be a rounding off.
    first = wide.gather(-1, mask.int().argmax(-1, keepdim=True))
    wide = torch.where(mask, wide - first, 0.0)
    return torch.where(mask, wide - wide.sum(-1, keepdim=True) / count.clamp(min=1), 0.0), count
