"""A word-level tokenizer, saved as an ordinary Hugging Face tokenizer, for policies from scratch."""

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


def word_tokenizer(words: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer of whitespace-separated words with exactly ``vocab_size`` ids.

    The ids that no word needs are ``<unused...>`` words: they can be sampled, as the rare tokens of
    a real vocabulary can, and so give a tiny policy a real tail.

    Raises:
        ValueError: if the words do not fit into ``vocab_size``.
    """
    vocabulary = list(dict.fromkeys([*SPECIAL.values(), *words]))
    if len(vocabulary) > vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for the task's {len(vocabulary)} words; raise it"
        )
    vocabulary += [f"<unused{i}>" for i in range(vocab_size - len(vocabulary))]
    model = WordLevel(
        {word: i for i, word in enumerate(vocabulary)}, unk_token=SPECIAL["unk_token"]
    )
    core = Tokenizer(model)
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **SPECIAL)
