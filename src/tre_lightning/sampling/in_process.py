"""The engine ``in_process``: batched sampling from the trained model, token by token.

Every sampled token consumes one uniform number that belongs to its row, so responses do not depend
on how rows are laid out over batches and devices.
"""

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from tre_lightning.batches import PromptBatch, Rollout
from tre_lightning.common.seeding import uniforms
from tre_lightning.policy.reading import Cached, Whole, eval_mode, start_decoding
from tre_lightning.sampling.base import Recorder, Sampling

# Finished rows leave the batch when at most this fraction of it is running: it copies the cache.
MOST_RUNNING = 7 / 8
_BLOCK = 64  # tokens among which a token is looked for once their block is known


def pick_tokens(logits: Tensor, uniform: Tensor, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sample by inverting the cumulative distribution, ``[B, V], [B] -> [B] int64, [B] float32``.

    ``top_p`` < 1 samples from the smallest nucleus that reaches it (crossing token included).
    The second tensor is the log-probability of the token in the whole distribution.
    """
    probs = whole = logits.float().softmax(-1)
    if top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.where(before < top_p, 0.0))
    # First the block, then the token: running sums in float64 over the whole vocabulary take
    # several times as long as the softmax.
    vocabulary = probs.shape[-1]
    if rest := -vocabulary % _BLOCK:
        probs = pad(probs, (0, rest))
    blocks = probs.unflatten(-1, (-1, _BLOCK))
    mass = blocks.sum(-1).double()
    reached = mass.cumsum(-1)
    point = uniform.to(reached.device).unsqueeze(-1) * reached[:, -1:]
    block = _first_above(reached, point)
    below = (reached - mass).gather(-1, block)
    row = torch.arange(len(block), device=block.device)
    inner = blocks[row, block.squeeze(-1)].cumsum(-1, dtype=torch.float64)
    token = (block * _BLOCK + _first_above(inner, point - below)).clamp_(max=vocabulary - 1)
    return token.squeeze(-1), whole.gather(-1, token).squeeze(-1).log()


def _first_above(cumulative: Tensor, point: Tensor) -> Tensor:
    """First place at which a running sum lies above a point, ``[B, n], [B, 1] -> [B, 1] int64``.

    A point that rounding put at or above the end is taken to lie just below it.
    """
    end = cumulative[:, -1:]
    point = point.minimum(end.nextafter(end.new_zeros(())))
    found = torch.searchsorted(cumulative, point, right=True)
    return found.clamp_(max=cumulative.shape[-1] - 1)  # NaN


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: PromptBatch,
    *,
    num_responses: int,
    uniforms: Tensor,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    sample_batch_size: int | None = None,
    record: Recorder | None = None,
) -> Rollout:
    """Sample ``num_responses`` responses to every prompt.

    Args:
        model: a causal language model.
        prompts: B prompts.
        num_responses: responses a prompt (n).
        uniforms: ``[B * n, max_new_tokens]`` numbers in [0, 1), one a token.
        eos_token_ids: tokens that end a response.
        pad_token_id: fills the response after its end.
        temperature: divides the logits, > 0.
        top_p: nucleus to sample from; 1.0 samples from the whole distribution.
        sample_batch_size: responses sampled at a time; None = all. Bounds the memory of the cache
            and, rounding aside, changes no response. Prompts of about one length are then sampled
            together.
        record: is told of every token that is sampled.

    Raises:
        ValueError: for a wrong number of ``uniforms``.
    """
    device, n = prompts.prompt_ids.device, num_responses
    rows = len(uniforms)
    if rows != len(prompts) * n:
        raise ValueError(f"uniforms has {rows} rows, not {len(prompts)} prompts x {n}")
    eos = torch.tensor(list(eos_token_ids), device=device)
    size = rows if sample_batch_size is None else sample_batch_size
    num_prompts = max(size // n, 1)  # whose responses fit
    # In parts, the shortest prompts first: a part is padded to its longest.
    order = torch.arange(len(prompts), device=device)
    if num_prompts < len(prompts):
        order = prompts.prompt_mask.sum(1).argsort(stable=True)
    by_prompt = uniforms.view(len(prompts), n, -1)
    numbered = torch.arange(rows, device=device).view(len(prompts), n)
    parts = []
    with eval_mode(model):
        for chosen in order.split(num_prompts):
            ids, mask = prompts.prompt_ids[chosen], prompts.prompt_mask[chosen]
            # One pass over each prompt serves all its responses.
            read = start_decoding(model, ids, mask)
            pieces = torch.arange(len(ids), device=device).repeat_interleave(n).split(size)
            numbers = by_prompt[chosen.to(uniforms.device)].flatten(0, 1).split(size)
            places = numbered[chosen].flatten().split(size)
            for piece, uniform, place in zip(pieces, numbers, places, strict=True):
                decoding = copy.deepcopy(read) if len(pieces) > 1 else read
                decoding.take(piece)
                told = None if record is None else partial(_tell, record, place)
                response, response_mask, finished, logprobs = _respond(
                    model, decoding, uniform.to(device), eos, pad_token_id, temperature, top_p, told
                )
                part = Rollout(
                    *(ids[piece], mask[piece], response, response_mask, finished),
                    behaviour_logprobs=logprobs,
                )
                parts.append(part)
    back = order.argsort()
    in_order = (back.unsqueeze(1) * n + torch.arange(n, device=device)).flatten()
    return concatenate(parts, pad_token_id)[in_order]


def concatenate(parts: Sequence[Rollout], pad_token_id: int) -> Rollout:
    """The rows of all parts in order, as wide as their longest response.

    The prompts of all parts are equally wide.
    """
    width = max(part.response_ids.shape[1] for part in parts)
    fill = {"response_ids": pad_token_id, "response_mask": False, "behaviour_logprobs": 0.0}

    def joined(name: str, _: Tensor) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        if name in fill:
            tensors = [pad(x, (0, width - x.shape[1]), value=fill[name]) for x in tensors]
        return torch.cat(tensors)

    return parts[0].map(joined)


def _respond(
    model: PreTrainedModel,
    decoding: Cached | Whole,
    uniforms: Tensor,
    eos: Tensor,
    pad_token_id: int,
    temperature: float,
    top_p: float,
    record: Recorder | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample one response per row: response, its mask, finished and log-probabilities."""
    count, max_new_tokens = uniforms.shape
    device = uniforms.device
    response = torch.full((count, max_new_tokens), pad_token_id, device=device)
    response_mask = torch.zeros(count, max_new_tokens, dtype=torch.bool, device=device)
    logprobs = torch.zeros(count, max_new_tokens, dtype=torch.float32, device=device)
    finished = torch.zeros(count, dtype=torch.bool, device=device)
    rows = torch.arange(count, device=device)  # that are still in the batch
    left = count  # rows that are not finished
    for t in range(max_new_tokens):
        token, logprob = pick_tokens(decoding.logits / temperature, uniforms[rows, t], top_p)
        running = ~finished[rows]
        if record is not None:
            said = slice(None) if left == len(rows) else running
            record(rows[said], t, token[said], decoding.logits[said])
        token = token.where(running, pad_token_id)
        response[rows, t] = token
        response_mask[rows, t] = running
        logprobs[rows, t] = logprob.where(running, 0.0)
        finished[rows] = ~running | torch.isin(token, eos)
        left = count - int(finished.sum())
        if t + 1 == max_new_tokens or left == 0:
            break
        if left <= MOST_RUNNING * len(rows):
            kept = (~finished[rows]).nonzero().squeeze(1)
            decoding.take(kept)
            rows, token, running = rows[kept], token[kept], running[kept]
        decoding.read(model, token, running)
    longest = int(response_mask.any(0).sum())
    return response[:, :longest], response_mask[:, :longest], finished, logprobs[:, :longest]


def _tell(
    record: Recorder, places: Tensor, rows: Tensor, column: int, tokens: Tensor, logits: Tensor
) -> None:
    """Tell of rows of a part by their numbers in the rollout."""
    record(places[rows], column, tokens, logits)


class InProcess:
    """Engine whose rows own their random numbers: batch layout and devices change no response."""

    def sample(self, model: PreTrainedModel, prompts: PromptBatch, how: Sampling) -> Rollout:
        """Sample; see :class:`~tre_lightning.sampling.base.RolloutEngine`."""
        n = how.num_responses
        numbers = uniforms(
            prompts.total_rows * n,
            how.max_new_tokens,
            *("responses", how.seed, prompts.split, prompts.index),
        )
        first = prompts.first_row * n
        return generate(
            model,
            prompts,
            num_responses=n,
            uniforms=numbers[first : first + len(prompts) * n],
            eos_token_ids=how.eos_token_ids,
            pad_token_id=how.pad_token_id,
            temperature=how.temperature,
            top_p=how.top_p,
            sample_batch_size=how.sample_batch_size,
            record=how.record,
        )
