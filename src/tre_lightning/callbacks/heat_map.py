"""A picture of responses: each token's text on the colour of its entropy, region size beneath."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Color = tuple[int, int, int]

# White to dark, by share of the scale.
_ENTROPY: Sequence[Color] = ((255, 255, 255), (253, 174, 97), (140, 0, 30))
_SIZE: Sequence[Color] = ((255, 255, 255), (116, 173, 209), (30, 40, 120))
_STEPS = 6  # of the legend, from white to the darkest

_WIDTH, _MARGIN, _PAD = 840, 12, 4
_TOKEN_HEIGHT, _SIZE_HEIGHT, _LINE_GAP = 24, 18, 6
_LONGEST_TOKEN, _LONGEST_TITLE, _MOST_TOKENS = 24, 100, 256

_TEXT = ImageFont.load_default(16)
_SMALL = ImageFont.load_default(13)


class _Scales(NamedTuple):
    """Shares of the colour scales; both end where a vocabulary of this many tokens does."""

    vocabulary: int

    @property
    def top(self) -> float:
        """The largest entropy, nats, and the logarithm of the largest region."""
        return math.log(max(self.vocabulary, 2))

    def entropy(self, nats: float) -> float:
        """The square root of the share, so that the small ones, which most are, can be told."""
        return math.sqrt(max(nats, 0.0) / self.top)

    def size(self, tokens: float) -> float:
        """The share of the logarithm."""
        return math.log(max(tokens, 1)) / self.top


@dataclass(frozen=True)
class Sample:
    """A response of n tokens."""

    title: str
    tokens: Sequence[str]  # n texts
    entropies: Sequence[float]  # n, nats
    sizes: Sequence[int]  # n, tokens in the region


def heat_map(samples: Sequence[Sample], vocabulary: int) -> Tensor:
    """Draw responses one below the other, ``[H, W, 3]`` uint8.

    Tokens flow like text. The colour scales are those of the vocabulary, so pictures of different
    iterations compare. Of a long response only the beginning is drawn.

    Args:
        samples: the responses.
        vocabulary: tokens that the policy knows.
    """
    scales = _Scales(vocabulary)
    height = _draw(None, samples, scales)
    image = Image.new("RGB", (_WIDTH, height), "white")
    _draw(ImageDraw.Draw(image), samples, scales)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, _WIDTH, 3)


def printable(text: str) -> str:
    """The text with escapes for what the font lacks; a leading or trailing space shows as a dot."""
    core = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    after = len(text) - len(core) - before if core else 0
    text = "·" * before + core + "·" * after
    escaped = "".join(
        c if c == "·" or (c.isascii() and c.isprintable()) else c.encode("unicode_escape").decode()
        for c in text
    )
    return _shortened(escaped, _LONGEST_TOKEN)


def _draw(draw: ImageDraw.ImageDraw | None, samples: Sequence[Sample], scales: _Scales) -> int:
    """Draw everything, or with None only measure; the height in pixels."""
    y = _legend(draw, _MARGIN, scales)
    for sample in samples:
        y += 2 * _LINE_GAP
        title = _shortened(" ".join(printable_words(sample.title)), _LONGEST_TITLE)
        _write(draw, (_MARGIN, y), title, _TEXT, (0, 0, 0))
        y += _TOKEN_HEIGHT
        y = _tokens(draw, y, sample, scales)
    return y + _MARGIN


def printable_words(text: str) -> list[str]:
    """The words of a text, each as :func:`printable` gives it."""
    return [printable(word) for word in text.split()]


def _tokens(draw: ImageDraw.ImageDraw | None, y: int, sample: Sample, scales: _Scales) -> int:
    x = _MARGIN
    rows = zip(sample.tokens, sample.entropies, sample.sizes, strict=True)
    for token, entropy, size in list(rows)[:_MOST_TOKENS]:
        text, number = printable(token), str(size)
        width = math.ceil(max(_TEXT.getlength(text), _SMALL.getlength(number))) + 2 * _PAD
        if x + width > _WIDTH - _MARGIN and x > _MARGIN:
            x, y = _MARGIN, y + _TOKEN_HEIGHT + _SIZE_HEIGHT + _LINE_GAP
        below = y + _TOKEN_HEIGHT
        _cell(
            draw, (x, y, x + width, below), text, _TEXT, _color(_ENTROPY, scales.entropy(entropy))
        )
        box = (x, below, x + width, below + _SIZE_HEIGHT)
        _cell(draw, box, number, _SMALL, _color(_SIZE, scales.size(size)))
        x += width + 1
    y += _TOKEN_HEIGHT + _SIZE_HEIGHT + _LINE_GAP
    left = len(sample.tokens) - _MOST_TOKENS
    if left > 0:
        _write(draw, (_MARGIN, y), f"... and {left} more tokens", _SMALL, (0, 0, 0))
        y += _SIZE_HEIGHT
    return y


def _legend(draw: ImageDraw.ImageDraw | None, y: int, scales: _Scales) -> int:
    shares = [step / _STEPS for step in range(_STEPS + 1)]
    entropies = [scales.top * share**2 for share in shares]
    sizes = [math.exp(scales.top * share) for share in shares]
    both = (
        ("entropy, nats", _ENTROPY, [f"{value:.2g}" for value in entropies]),
        ("region size, tokens", _SIZE, [_short(value) for value in sizes]),
    )
    for x, (name, colors, labels) in zip((_MARGIN, _WIDTH // 2), both, strict=True):
        _write(draw, (x, y), name, _SMALL, (0, 0, 0))
        x += 140
        for share, label in zip(shares, labels, strict=True):
            _cell(draw, (x, y, x + 36, y + _SIZE_HEIGHT), label, _SMALL, _color(colors, share))
            x += 36
    return y + _SIZE_HEIGHT


def _short(number: float) -> str:
    """A number in four characters."""
    return f"{number:.0f}" if number < 1000 else f"{number / 1000:.{int(number < 9950)}f}k"


def _cell(
    draw: ImageDraw.ImageDraw | None,
    box: tuple[int, int, int, int],
    text: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    color: Color,
) -> None:
    if draw is not None:
        draw.rectangle(box, fill=color, outline=(200, 200, 200))
    red, green, blue = color
    dark = 0.3 * red + 0.6 * green + 0.1 * blue < 128
    _write(draw, (box[0] + _PAD, box[1] + 2), text, font, (255, 255, 255) if dark else (0, 0, 0))


def _write(
    draw: ImageDraw.ImageDraw | None,
    place: tuple[int, int],
    text: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    color: Color,
) -> None:
    if draw is not None:
        draw.text(place, text, fill=color, font=font)


def _color(colors: Sequence[Color], share: float) -> Color:
    """The colour at a share of the scale; grey for NaN."""
    if math.isnan(share):
        return (128, 128, 128)
    place = min(max(share, 0.0), 1.0) * (len(colors) - 1)
    low = min(int(place), len(colors) - 2)
    red, green, blue = (
        round(a + (b - a) * (place - low))
        for a, b in zip(colors[low], colors[low + 1], strict=True)
    )
    return red, green, blue


def _shortened(text: str, length: int) -> str:
    """The text cut to a number of characters, its middle left out."""
    if len(text) <= length:
        return text
    kept = length - 3
    return f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"
