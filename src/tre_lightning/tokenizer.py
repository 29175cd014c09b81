"""A word-level tokenizer for policies from scratch, saved as any Hugging Face tokenizer is."""

from collections.abc import Sequence
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


def word_tokenizer(words: Sequence[str], config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """A tokenizer of whitespace-separated words with exactly the model's ``vocab_size`` ids.

    The ids that no word needs are ``<unused...>`` words: they can be sampled, as the rare tokens of
    a real vocabulary can, and so give a tiny policy a real tail.

    Raises:
        ValueError: if the words do not fit into ``vocab_size``, or transformers would load another
            tokenizer from a directory of this kind of model (it does for qwen2).
    """
    vocabulary = list(dict.fromkeys([*SPECIAL.values(), *words]))
    size = int(config.vocab_size)
    if len(vocabulary) > size:
        raise ValueError(
            f"model.policy.architecture.vocab_size={size} is too small for the task's "
            f"{len(vocabulary)} words; raise it"
        )
    vocabulary += [f"<unused{i}>" for i in range(size - len(vocabulary))]
    model = WordLevel(
        {word: i for i, word in enumerate(vocabulary)}, unk_token=SPECIAL["unk_token"]
    )
    core = Tokenizer(model)
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **SPECIAL)
    with TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        text = " ".join(words)
        reloaded = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    if reloaded != tokenizer(text)["input_ids"]:
        raise ValueError(
            f"model.policy.architecture.model_type={config.model_type} makes transformers load a "
            "tokenizer of its own from the saved model; use another, for example qwen3"
        )
    return tokenizer
