"""A tiny random model by SmolLM2's rules, as a Hugging Face directory and as a GGUF file.

Its chat template writes a system message of its own, padding is the end token, the head is tied to
the embeddings, and the vocabulary is wider than what the tokenizer can write.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from chat_tokenizers import SMOL_SPECIAL, smol

VOCABULARY = 352
DEFAULT_SYSTEM = "You are a helpful AI assistant named Tiny"
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = ("What is the sum? The answer is system user assistant How many are there now?",) * 9


def tokenizer() -> PreTrainedTokenizerBase:
    """Bytes and a few words; 0, 1 and 2 are the special tokens."""
    return smol(TEMPLATE, _CORPUS, VOCABULARY - 20)


def model() -> LlamaForCausalLM:
    """The random weights, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def save(directory: Path) -> Path:
    """Write it as a Hugging Face directory."""
    model().save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def write_gguf(file: Path, *, quantised: bool = False, spoil: float | None = None) -> Path:
    """Write it as llama.cpp would, in float32 or with 8 bits a weight.

    ``spoil``: one of the weights is this number.
    """
    import gguf

    written, llama, config = gguf.GGUFWriter(file, "llama"), model(), model().config
    written.add_name("tiny")
    written.add_context_length(config.max_position_embeddings)
    written.add_embedding_length(config.hidden_size)
    written.add_block_count(config.num_hidden_layers)
    written.add_feed_forward_length(config.intermediate_size)
    written.add_head_count(config.num_attention_heads)
    written.add_head_count_kv(config.num_key_value_heads)
    written.add_layer_norm_rms_eps(config.rms_norm_eps)
    written.add_rope_freq_base(10_000.0)
    written.add_vocab_size(VOCABULARY)
    core = tokenizer().get_vocab()
    by_id = {number: token for token, number in core.items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(VOCABULARY)]
    control, unused, normal = gguf.TokenType.CONTROL, gguf.TokenType.UNUSED, gguf.TokenType.NORMAL
    kinds = [control if t in SMOL_SPECIAL else normal if t in core else unused for t in tokens]
    written.add_tokenizer_model("gpt2")
    written.add_tokenizer_pre("smollm")
    written.add_token_list(tokens)
    written.add_token_types(kinds)
    state = tokenizer().backend_tokenizer.to_str()
    written.add_token_merges(_merges(state))
    written.add_bos_token_id(1)
    written.add_eos_token_id(2)
    written.add_unk_token_id(0)
    written.add_pad_token_id(2)
    written.add_chat_template(TEMPLATE)
    for name, weight in llama.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        rows = weight.numpy().copy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):  # llama.cpp's order of rotary pairs
            if part in name:
                pairs = rows.reshape(heads, 2, -1, rows.shape[1])
                rows = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))
        if spoil is not None and name == "model.norm.weight":
            rows[0] = spoil
        if quantised and rows.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            written.add_tensor(_gguf_name(name), gguf.quants.quantize(rows, kind), raw_dtype=kind)
        else:
            written.add_tensor(_gguf_name(name), rows)
    written.write_header_to_file()
    written.write_kv_data_to_file()
    written.write_tensors_to_file()
    written.close()
    return file


def _merges(state: str) -> list[str]:
    merges = json.loads(state)["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _gguf_name(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("q_proj", "q"),
        ("k_proj", "k"),
        ("v_proj", "v"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ):
        name = name.replace(ours, theirs)
    return name
