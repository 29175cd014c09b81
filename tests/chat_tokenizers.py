"""Tokenizers of each kind of control tokens, trained on a few words."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tre_lightning.policy.tokenizers import word_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = (  # end and start of a turn are no special tokens, and BOS is written by the template
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + m.role + '\n' + m.content + '</turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
SMOL = (  # a system message of its own where none is given
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful model<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m.role + '\n' "
    "+ m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOL_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
CORPUS = ["Combine the numbers 3 4 5 into 17.", "user assistant model system", "end im start |"] * 9


@cache
def chatml() -> PreTrainedTokenizerBase:
    """Bytes, as of Qwen; the tags of an answer are special tokens, too."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim|>", *TAGS]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special[1:],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@cache
def smol(
    template: str = SMOL, corpus: tuple[str, ...] = tuple(CORPUS), vocabulary: int = 350
) -> PreTrainedTokenizerBase:
    """Bytes by the rules of SmolLM2: pad = eos, bos starts every turn, a default system message.

    Ids 0, 1 and 2 are the special tokens.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = [*SMOL_SPECIAL]
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=names, **options)
    core.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def pieces(template: str | None = TURNS, *, unigram: bool = False) -> PreTrainedTokenizerBase:
    """SentencePiece with BOS before and EOS behind a text (``add_eos_token``), as of Llama."""
    special = ["<unk>", "<s>", "</s>"]
    core = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    letters = [*"abcdefghijklmnopqrstuvwxyzCU0123456789<>/|.\n"]
    options = {"vocab_size": 120, "initial_alphabet": letters, "show_progress": False}
    kind = trainers.UnigramTrainer if unigram else trainers.BpeTrainer
    extra = {"unk_token": "<unk>"} if unigram else {}
    core.train_from_iterator(CORPUS, kind(special_tokens=special, **options, **extra))
    core.add_tokens([AddedToken(token, special=False) for token in ("<turn>", "</turn>")])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(token, core.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<s>"
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def words() -> PreTrainedTokenizerBase:
    """Whole words; the control tokens are words as well."""
    vocabulary = ["user", "Human:", "Assistant:", "w1", "w2"]
    return word_tokenizer(vocabulary, AutoConfig.for_model("llama", vocab_size=16))
