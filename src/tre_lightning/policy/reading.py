"""How a model reads rows of unequal length, found by trial on a few tokens.

The log-probability of a token must be one number wherever it is computed: sampled a token at a time
from a decoding state, or in one pass over a batch of padded rows. What a model makes of left
padding, position ids and a decoding state differs from architecture to architecture. So each is
tried out once, on the model at hand, against what the model says of a row by itself: without
padding, mask, position ids and state.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from tre_lightning.common.errors import Refused
from tre_lightning.policy.kv_cache import growing_cache
from tre_lightning.policy.packing import Packed, can_pack
from tre_lightning.policy.tokenizers import vocabulary_size

# Relative difference of two outputs that are equal but for rounding.
_CLOSE, _CLOSE_TF32, _CLOSE_HALF = 3e-4, 1e-2, 0.1
_MASKED = -1e30  # logits of tokens that a model never says
_ROW, _OTHER, _PROMPT = 9, 12, 6  # tokens of the row that is looked at, of another, of its prompt
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """Which layout of padded rows a model reads as it reads each row alone.

    ``padded``: rows padded on the left, with an attention mask and position ids. Every causal model
    reads rows whose tokens come first, which is what the others get.

    ``cached``: a decoding state, read and extended a token at a time, rows repeated and reordered;
    the others make a whole pass for each token.

    ``packed``: rows side by side in one sequence, a shared prompt once, gradients included; see
    :mod:`tre_lightning.policy.packing`.

    ``width``: numbers of an output.
    """

    padded: bool
    cached: bool
    packed: bool
    width: int


def reading(model: nn.Module) -> Reading:
    """The :class:`Reading` of a language model or its trunk; tried out once, with whole weights.

    Raises:
        Refused: if rows with other tokens after them are not read as they are alone, or the model
            is not ready for plain tokens.
    """
    found: Reading | None = vars(model).get("_reading")
    if found is None:
        found = _tried(model)
        vars(model)["_reading"] = found  # a copy of the model reads as it does
    return found


@dataclass(frozen=True)
class Layout:
    """Rows in a layout that a model reads, and where n outputs of it are found."""

    inputs: dict[str, Any]
    places: Tensor  # [n] int64, of these outputs among those of all rows, one row after another
    # Columns that have all of them, [K], and places among those of these columns, [n].
    kept: tuple[Tensor, Tensor] | None = None
    packed: Packed | None = None

    def run(self, model: nn.Module, **options: Any) -> Any:
        """What the model makes of the rows."""
        with nullcontext() if self.packed is None else self.packed.attended(model):
            return model(**self.inputs, **options)

    def pick(self, outputs: Tensor) -> Tensor:
        """The n outputs, ``[n, ...]``, out of all, ``[b, c, ...]``."""
        return outputs.flatten(0, 1).index_select(0, self.places)

    def logits(self, model: nn.Module) -> Tensor:
        """Logits ``[n, V]`` of a language model."""
        if self.kept is None or not takes(model, "logits_to_keep"):
            return self.pick(self.run(model).logits)
        columns, places = self.kept
        logits: Tensor = self.run(model, logits_to_keep=columns).logits
        return logits.flatten(0, 1).index_select(0, places)

    def hidden_states(self, trunk: nn.Module) -> Tensor:
        """Last hidden states ``[n, D]`` of a trunk."""
        return self.pick(self.run(trunk).last_hidden_state)


def laid_out(
    model: nn.Module, ids: Tensor, mask: Tensor, asked: Tensor, prompt: int | None = None
) -> Layout:
    """Inputs for one forward pass, in the layout that costs the model least.

    Args:
        model: a language model or its trunk.
        ids: ``[B, C]`` rows.
        mask: ``[B, C]`` bool, True = a real token.
        asked: ``[B, C]`` bool, the n tokens whose outputs are wanted, in reading order.
        prompt: the first columns, which several rows may have in common; None = they do not.
    """
    found = reading(model)
    if found.packed and prompt is not None and asked.any():
        return _packed(ids, mask, asked, prompt)
    return _padded(model, ids, mask, asked) if found.padded else _shifted(ids, mask, asked)


def before(counted: Tensor, prompt: int) -> Tensor:
    """The tokens right before the response tokens ``[B, T]``, ``[B, prompt + T]`` bool."""
    return pad(counted, (prompt - 1, 1))


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """The trunk of a language model: what lies below its head.

    Raises:
        Refused: if there is no such part.
    """
    # The children are for classes whose prefix names no part of them, such as Llama 4's.
    for part in (model.base_model, *model.children()):
        if isinstance(part, PreTrainedModel) and part is not model:
            inner = list(part.children())
            wraps = len(inner) == 1 and isinstance(inner[0], PreTrainedModel)
            return cast(PreTrainedModel, inner[0]) if wraps else part
    raise Refused(f"{type(model).__name__} has no trunk below its head")


def takes(model: nn.Module, option: str) -> bool:
    """Whether a model's forward pass names an option."""
    return option in inspect.signature(model.forward).parameters


def positions(mask: Tensor) -> Tensor:
    """Position ids of a left-padded batch, ``[B, T] bool -> [B, T] int64``; padding gets 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context in evaluation mode: in training mode, gradient checkpointing drops the cache."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def is_noisy(model: nn.Module) -> bool:
    """Whether two passes in the current modes differ, from each other or from evaluation mode."""
    with _undisturbed(model):
        row = _tokens(model)[:, :_ROW]
        with eval_mode(model):
            plain = _plain(model, row)
        with torch.enable_grad():  # or there is no gradient checkpointing
            passes = [_plain(model, row).detach() for _ in range(2)]
    return not all(_agree(model, plain, again) for again in passes)


# ----- decoding


@dataclass
class Cached:
    """Decoding with the model's state (such as a KV cache): R rows of C tokens so far."""

    cache: DynamicCache
    mask: Tensor  # [R, C] bool, True = a real token
    next_position: Tensor  # [R, 1] int64
    logits: Tensor  # [R, V] of the next token

    @classmethod
    def start(cls, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Self:
        """Read the prompts, ``[R, P]``, padded on the left."""
        cache = growing_cache(model.config)
        logits = _next_logits(model, cache, ids, mask, positions(mask))
        return cls(cache, mask, mask.sum(-1, keepdim=True), logits)

    def read(self, model: PreTrainedModel, tokens: Tensor, counted: Tensor) -> None:
        """Read one token of each row, ``[R]``; those not ``counted`` (``[R]`` bool) are padding."""
        self.mask = torch.cat([self.mask, counted.unsqueeze(1)], dim=1)
        self.logits = _next_logits(
            model, self.cache, tokens.unsqueeze(1), self.mask, self.next_position
        )
        self.next_position = self.next_position + 1

    def take(self, rows: Tensor) -> None:
        """Keep these rows, ``[R']`` int64, in this order; a row may be kept several times."""
        # Of the cache's methods the one that knows every kind of layer.
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]
        self.mask, self.logits = self.mask[rows], self.logits[rows]
        self.next_position = self.next_position[rows]


@dataclass
class Whole:
    """Decoding without a state: R rows of C tokens so far, and a whole pass for every token."""

    ids: Tensor  # [R, C] int64
    mask: Tensor  # [R, C] bool, True = a real token
    logits: Tensor  # [R, V] of the next token

    @classmethod
    def start(cls, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Self:
        """Read the prompts, ``[R, P]``, padded on the left."""
        return cls(ids, mask, cls._last_logits(model, ids, mask))

    def read(self, model: PreTrainedModel, tokens: Tensor, counted: Tensor) -> None:
        """Read one token of each row, ``[R]``; outputs of those not ``counted`` are unused."""
        self.ids = torch.cat([self.ids, tokens.unsqueeze(1)], dim=1)
        self.mask = torch.cat([self.mask, counted.unsqueeze(1)], dim=1)
        self.logits = self._last_logits(model, self.ids, self.mask)

    def take(self, rows: Tensor) -> None:
        """Keep these rows, ``[R']`` int64, in this order; a row may be kept several times."""
        self.ids, self.mask, self.logits = self.ids[rows], self.mask[rows], self.logits[rows]

    @staticmethod
    def _last_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
        last = torch.zeros_like(mask)
        last[:, -1] = True
        return laid_out(model, ids, mask, last).logits(model)


def start_decoding(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Cached | Whole:
    """Read the prompts, ``[R, P]``, padded on the left."""
    used = mask.any(0)  # these prompts may be shorter than others of their batch
    kind = Cached if reading(model).cached else Whole
    return kind.start(model, ids[:, used], mask[:, used])


def _next_logits(
    model: PreTrainedModel, cache: DynamicCache, ids: Tensor, mask: Tensor, position_ids: Tensor
) -> Tensor:
    options: dict[str, Any] = {
        "position_ids": position_ids,
        "past_key_values": cache,
        "logits_to_keep": 1,
    }
    if takes(model, "cache_params"):  # of a state space model, which looks at new tokens alone
        options["cache_params"], mask = cache, mask[:, -ids.shape[1] :]
    named = {name: value for name, value in options.items() if takes(model, name)}
    out = model(input_ids=ids, attention_mask=mask.long(), use_cache=True, **named)
    logits: Tensor = out.logits[:, -1]
    return logits


# ----- layouts


def _padded(model: nn.Module, ids: Tensor, mask: Tensor, asked: Tensor) -> Layout:
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    if takes(model, "position_ids"):
        inputs["position_ids"] = positions(mask)
    rows, columns = asked.nonzero(as_tuple=True)
    kept = asked.any(0)
    number = kept.cumsum(0) - 1
    of_kept = rows * kept.sum() + number[columns]
    return Layout(inputs, rows * ids.shape[1] + columns, (kept.nonzero().squeeze(1), of_kept))


def _shifted(ids: Tensor, mask: Tensor, asked: Tensor) -> Layout:
    """Rows shifted to the left: what follows a token does not change a causal model's output."""
    width, shift = ids.shape[1], mask.int().argmax(1, keepdim=True)
    columns = (torch.arange(width, device=ids.device) + shift).clamp(max=width - 1)
    rows, asked_columns = asked.nonzero(as_tuple=True)
    places = rows * width + (asked_columns - shift[rows, 0]).clamp(min=0)
    return Layout({"input_ids": ids.gather(1, columns), "use_cache": False}, places)


def _packed(ids: Tensor, mask: Tensor, asked: Tensor, prompt: int) -> Layout:
    packed = Packed.of(ids, mask, asked, prompt)
    n = torch.arange(len(packed.asked), device=ids.device)
    return Layout(packed.inputs, packed.asked, (packed.asked, n), packed)


# ----- the trial


def _tried(model: nn.Module) -> Reading:
    with _undisturbed(model), eval_mode(model):
        versions = [parameter._version for parameter in model.parameters()]
        tokens = _tokens(model)
        row, other = tokens[:, :_ROW], tokens[:, _ROW:]
        plain = _plain(model, row)
        if plain.shape[:2] != row.shape or plain.shape[-1] == 0:
            raise Refused(f"{type(model).__name__} gives no output for each token")
        pair = torch.zeros(2, _OTHER, dtype=row.dtype, device=row.device)
        pair[0, -_ROW:], pair[1] = row[0], other[0]
        mask = torch.ones_like(pair, dtype=torch.bool)
        mask[0, :-_ROW] = False

        shifted = _shifted(pair, mask, mask)
        whole = shifted.pick(_plain(model, shifted.inputs["input_ids"]))
        if not _agree(model, plain[0], whole[:_ROW]):
            raise Refused(
                f"{type(model).__name__} reads a token otherwise with others behind it or beside "
                "it: it is no causal language model"
            )
        padded = _works(lambda: _pads(model, pair, mask, plain))
        cached = hasattr(model, "get_output_embeddings") and _works(
            lambda: _decodes(cast(PreTrainedModel, model), pair, mask, plain)
        )
        if versions != [parameter._version for parameter in model.parameters()]:
            raise Refused(f"{type(model).__name__} changes its weights in a forward pass")
    packed = can_pack(model) and _works(lambda: _packs(model))
    return Reading(padded, cached, packed, plain.shape[-1])


def _pads(model: nn.Module, pair: Tensor, mask: Tensor, plain: Tensor) -> bool:
    """Whether the first of two rows is read with padding as it is alone."""
    layout = _padded(model, pair, mask, mask)
    return _agree(model, plain[0], layout.pick(_values(layout.run(model)))[:_ROW])


def _decodes(model: PreTrainedModel, pair: Tensor, mask: Tensor, plain: Tensor) -> bool:
    """Whether the first of two rows is read from a decoding state as it is alone."""
    start = _OTHER - (_ROW - _PROMPT)
    state = Cached.start(model, pair[:, :start], mask[:, :start])
    found = [state.logits[0]]
    rows = torch.tensor([1, 0, 0], device=pair.device)
    state.take(rows)
    for column in range(start, _OTHER - 1):
        state.read(model, pair[rows, column], torch.ones_like(rows, dtype=torch.bool))
        found.append(state.logits[2])
    return _agree(model, plain[0, _PROMPT - 1 : -1], torch.stack(found))


def _packs(model: nn.Module) -> bool:
    """Whether packed rows have the outputs and gradients of rows by themselves.

    In the model's present modes: with gradient checkpointing where that is on.
    """
    with _undisturbed(model), torch.inference_mode(False), torch.enable_grad():
        tokens = _tokens(model)[0]
        prompts = torch.stack([tokens[i : i + _PROMPT] for i in (0, 1, 0)])  # two are equal
        ids = torch.cat([prompts, tokens[-3 * _PROMPT :].view(3, -1)], dim=1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, 0] = mask[0, -2:] = False
        asked = before(mask[:, _PROMPT:], _PROMPT)
        layouts = _shifted(ids, mask, asked), _packed(ids, mask, asked, _PROMPT)
        (plain, plain_gradients), (packed, gradients) = (
            _differentiated(model, layout, tokens.unique()) for layout in layouts
        )
    return _agree(model, plain, packed) and _agree(model, plain_gradients, gradients)


def _differentiated(model: nn.Module, layout: Layout, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``[n, W]``, and gradients ``[K * D]`` of a sum by the embeddings of K tokens."""
    outputs, embeddings = _with_embeddings(model, layout)
    weights = torch.arange(outputs.numel(), device=outputs.device).cos().view_as(outputs)
    loss = (outputs.where(outputs > _MASKED, 0.0) * weights).sum()
    gradients = torch.autograd.grad(loss, embeddings)[0].flatten(0, 1)
    number = torch.searchsorted(tokens, layout.inputs["input_ids"].flatten())
    summed = gradients.new_zeros(len(tokens), gradients.shape[-1])
    return outputs.detach(), summed.index_add(0, number, gradients).flatten()


def _with_embeddings(model: nn.Module, layout: Layout) -> tuple[Tensor, Tensor]:
    """Outputs ``[n, W]``, and the embeddings ``[b, c, D]`` that they come from."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    hook = cast(PreTrainedModel, model).get_input_embeddings().register_forward_hook(keep)
    try:
        outputs = layout.pick(_values(layout.run(model)))
    finally:
        hook.remove()
    return outputs, seen[0]


def _works(attempt: Callable[[], bool]) -> bool:
    try:
        return attempt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may raise anything at what it does not know
        _log.debug("%s", error)
        return False


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Context without gradients, whose random draws leave the generators unchanged."""
    device = next(model.parameters()).device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _tokens(model: nn.Module) -> Tensor:
    """Ordinary tokens ``[1, _ROW + _OTHER]``; special ones are at the ends of a vocabulary.

    One is that of padding: in a text it is a token as any other, often that of the end.
    """
    config = cast(PreTrainedModel, model).config
    size, pad = vocabulary_size(config), getattr(config.get_text_config(), "pad_token_id", None)
    if size is None:
        raise Refused(f"{type(model).__name__} has no vocabulary")
    device = next(model.parameters()).device
    tokens = torch.linspace(size // 8, size // 2, _ROW + _OTHER, device=device).long()
    if isinstance(pad, int) and 0 <= pad < size:
        tokens[2] = pad
    return tokens.unsqueeze(0)


def _plain(model: nn.Module, ids: Tensor) -> Tensor:
    """A model's outputs for rows without padding, or with tokens after them."""
    try:
        return _values(model(input_ids=ids, use_cache=False))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Refused(
            f"{type(model).__name__} cannot read plain tokens ({type(error).__name__}: "
            f"{str(error)[:200]})"
        ) from error


def _values(output: Any) -> Tensor:
    """Logits of a language model, or last hidden states of a trunk."""
    values: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return values


def _agree(model: nn.Module, plain: Tensor, other: Tensor) -> bool:
    """Whether outputs ``[..., W]`` are equal up to rounding, relative to their spread."""
    close = _CLOSE if torch.get_float32_matmul_precision() == "highest" else _CLOSE_TF32
    if any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters()):
        close = _CLOSE_HALF
    plain, other = plain.double(), other.double()
    said = plain > _MASKED
    plain, other = plain.where(said, 0.0), other.where(said, 0.0)
    spread = (plain - plain.mean(-1, keepdim=True)).norm(dim=-1)
    return bool(((plain - other).norm(dim=-1) <= close * spread).all())
