"""A causal language model from a GGUF file or the hub as a plain Hugging Face directory.

GGUF is llama.cpp's format: one file of weights, often quantised, with configuration and tokenizer.
transformers reads it; here the weights become plain numbers again, so that they can be trained, and
what was written is read back before anybody takes it for a model.
"""

import gc
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tre_lightning.common.errors import read
from tre_lightning.policy.tokenizers import (
    check_special_tokens,
    load_tokenizer,
    vocabulary_size,
)

_GGUF = b"GGUF"  # how such a file begins
_TRIED_TOKENS = 16
_TRIED_TEXT = "What is 16 + 2?\nIt is 18."


def check_can_convert(source: str) -> None:
    """Refuse a source that is seen to be no model, before any work.

    Args:
        source: a GGUF file, or the name of a model on the hub.

    Raises:
        ValueError: naming the source and the fix.
    """
    path = Path(source)
    if path.is_dir():
        raise ValueError(
            f"{source} is a directory; if it holds a model, give --model.policy.model {source}"
        )
    if not is_gguf(source):
        return
    if not path.is_file():
        raise ValueError(f"{source} does not exist; give a GGUF file, or a hub name OWNER/NAME")
    with path.open("rb") as file:
        if file.read(len(_GGUF)) != _GGUF:
            raise ValueError(f"{source} is no GGUF file: it does not begin with the letters GGUF")
    check_reader(source)


def check_reader(source: str) -> None:
    """Raise ValueError where the packages are missing that read a GGUF file."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{source} needs the package {' and '.join(missing)}; pip install 'tre-lightning[gguf]'"
        )


def is_gguf(source: str) -> bool:
    """Whether a source is a file on this machine or looks like one, and not a hub name."""
    return Path(source).is_file() or source.lower().endswith(".gguf")


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def convert(source: str, directory: Path) -> PreTrainedModel:
    """Write the model and its tokenizer into a directory, and read them back.

    Args:
        source: a GGUF file, or the name of a model on the hub.
        directory: where the files go; what it holds is not to be trusted if this raises.

    Returns:
        The model as it is read back.

    Raises:
        ValueError: if it cannot be read, or is no causal language model with a tokenizer.
    """
    model, tokenizer = _load_gguf(source) if is_gguf(source) else _load(source)
    size = vocabulary_size(model.config)
    check_special_tokens(tokenizer, size, source, needed=("eos_token",))
    ids = torch.arange(_TRIED_TOKENS).unsqueeze(0) * ((size or _TRIED_TOKENS) // _TRIED_TOKENS)
    wanted, words = _logits(model, ids), tokenizer(_TRIED_TEXT)["input_ids"]
    if not wanted.isfinite().all():
        raise ValueError(f"{source} has weights that are not finite; give another file")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    del model
    gc.collect()  # a large one does not fit into memory twice
    written = AutoModelForCausalLM.from_pretrained(directory)
    same_words = load_tokenizer(str(directory))(_TRIED_TEXT)["input_ids"] == words
    if not (same_words and torch.equal(_logits(written, ids), wanted)):
        raise ValueError(
            f"{source} is another model when it is read back: transformers "
            f"{transformers.__version__} cannot write it; give another file"
        )
    assert isinstance(written, PreTrainedModel)
    return written


def _load_gguf(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = Path(source)
    options: dict[str, Any] = {"gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **options)
        if plain := getattr(transformers, "GgufConfig", None):  # newer ones may keep the blocks
            options["quantization_config"] = plain(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), **options)
    except Exception as error:  # a file may be wrong in any way
        raise ValueError(
            f"{source} could not be read ({type(error).__name__}: {str(error).strip()[:200]}); "
            "give a whole GGUF file of a causal language model with its tokenizer"
        ) from error
    # Its weights are plain numbers by now, and whoever loads it is not to take them for blocks.
    vars(model).update(hf_quantizer=None, is_quantized=False)
    vars(model.config).pop("quantization_config", None)
    return model, tokenizer


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return (
        read("model", name, AutoModelForCausalLM.from_pretrained),
        read("model", name, AutoTokenizer.from_pretrained),
    )


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model.eval()(input_ids=ids).logits
    return logits.float()
