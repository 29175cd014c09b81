"""Seconds of a PPO iteration: this package beside trl's trainers, in one run.

    pip install trl accelerate                                                    # GRPOTrainer
    pip install --target runs/trl_ppo --no-deps trl==1.12.0                       # PPOTrainer
    python benchmarks/ppo_step.py --trl_ppo runs/trl_ppo --lengths uneven         # some minutes
    python benchmarks/ppo_step.py --device cuda --size 100m                       # never run so far

trl is no dependency of this package; without it its rows are left out, with a line that says so.
Releases after 1.12.0 have no PPOTrainer any more, hence the second installation.

Prints tables; writes ``LENGTHS.json`` (``even.json``, ``uneven.json``). Every contestant runs in a
fresh process, one at a time; they take turns within a repetition. Of each process the first
iteration is not counted. The time of an iteration is that from the end of one to the end of the
next: batches, tokenisation, sampling, scoring, update and the trainer's own work. *Update* is from
the first forward pass of the first update to the end of the last optimiser step. The tables show
medians over iterations and repetitions; *CPU s* are processor seconds, which on one thread mean
something on a busy machine too. *Peak* is the most memory that a process held (on a GPU, that
PyTorch allocated), less what it held before the model was read.

The same for all: the model (a Qwen3 from scratch, the same weights, read from a directory; or that
of ``--model``), the prompts (all equally long, ``--prompt_tokens``), 8 responses a prompt, the most
new tokens, 4 updates of a quarter of the responses each, one epoch; the reward (a cheap Python
function of the text), AdamW at the same learning rate, gradient clipping at 1, the precision,
PyTorch's threads. No checkpoints, no logger, no validation. trl takes the responses of an update in
one forward and backward pass; ours cuts them into micro-batches as it does by default.

``--lengths even``: no response ends early. The end-of-sequence and padding tokens of the tokenizer
lie outside of the model's vocabulary, so that no sampler ever draws them and none needs a logits
processor to hold them back. Nobody pads.

``--lengths uneven``: every token ends the response with one and the same probability, so that
lengths are geometric, 47 tokens in the mean before the cut at the most new tokens. The model's head
gives the end token that probability, whatever the context (:func:`bias_head`). With ``--model`` it
is the token whose frequency in the model's own responses comes nearest.

PPOTrainer does not clip gradients, and takes old log-probabilities from the logits of sampling. It
computes all rows at the width of the longest response; so does GRPOTrainer.

Set for trl, where its defaults are slower or do something else:

* ``gradient_checkpointing=False`` (default true: activations twice), ``bf16=False`` on a CPU
  (default true), ``use_cpu`` as asked, ``report_to="none"``, ``save_strategy="no"``,
  ``log_completions=False``, ``dataloader_num_workers=0``, ``disable_tqdm=True``, ``logging_steps``
  of one iteration.
* GRPO: ``num_generations=8``, ``per_device_train_batch_size`` a quarter of the responses,
  ``gradient_accumulation_steps=1``, ``steps_per_generation=4``, ``num_iterations=1``: one sampling
  pass over all responses, then 4 updates; ``beta=0``: no reference. Ours: ``estimator: grpo``,
  ``critic: none``. The model has no dropout.
* PPO: ``stop_token="eos"`` where lengths are uneven; ``per_device_train_batch_size`` all responses,
  which it divides by ``num_mini_batches=4`` for an update; ``num_ppo_epochs=1``,
  ``num_sample_generations=0``, rollout batches of all responses in sampling
  (``local_rollout_forward_batch_size``; the default 64 is slower).
  PPOTrainer always has a reference model and samples one response to each row, so the rows are the
  prompts 8 times over; the reward function is wrapped into a module. Ours: ``critic: separate`` and
  ``kl_coef: 0.05``, as there, so with a reference too.
* the rest is trl's defaults: for example the fused AdamW, and in GRPOTrainer the fused head.

Ours runs as on the command line, which has the C library keep freed memory
(:mod:`tre_lightning.common.malloc`); *same malloc* is trl with that setting too.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from tre_lightning.common.memory import peak_memory
from tre_lightning.common.seeding import generator

KL_COEF = 0.05  # of PPO; PPOTrainer's default
LR = 1e-5
UPDATES = 4  # an iteration
RESPONSES = 8  # a prompt
MEAN_LENGTH = 47  # tokens of an uneven response, if nothing cut it
WORDS = "words.json"  # beside the model: those of the prompts
MIB = 2**20
GRPO, PPO = "GRPO, no critic", "PPO, critic and reference"
Fields = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is trained."""

    prompts: int  # an iteration
    prompt_tokens: int
    new_tokens: int  # at most
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    uneven: bool = False

    @property
    def rows(self) -> int:
        """Responses an iteration."""
        return self.prompts * RESPONSES


SIZES = {
    "quick": Setting(4, 16, 8, 512, 32, 1, 4, 4),
    "tiny": Setting(32, 16, 32, 4096, 128, 3, 4, 4),
    "100m": Setting(32, 64, 256, 32768, 768, 12, 12, 4),
}
# Where lengths are uneven: tokens of a prompt and, at most, of a response.
UNEVEN = {"quick": (16, 24), "tiny": (32, 256), "100m": (64, 256)}
WHO = ("ours", "trl", "trl, same malloc")


def setting_of(options: argparse.Namespace) -> Setting:
    """What the options ask for."""
    setting, uneven = SIZES[options.size], options.lengths == "uneven"
    prompt_tokens, new_tokens = setting.prompt_tokens, setting.new_tokens
    if uneven:
        prompt_tokens, new_tokens = UNEVEN[options.size]
    return replace(
        setting,
        uneven=uneven,
        prompts=options.prompts or setting.prompts,
        prompt_tokens=options.prompt_tokens or prompt_tokens,
        new_tokens=options.new_tokens or new_tokens,
    )


def save_model(setting: Setting, directory: Path, source: Path | None = None) -> None:
    """A model and a tokenizer as a model hub's: from ``source``, or from scratch.

    From scratch it is a Qwen3 with random weights, whose tokenizer knows words ``w0``, ``w1``, ...

    Where no response ends early, end of sequence and padding are the tokenizer's last two ids,
    beyond the model's vocabulary.
    """
    disable_progress_bar()
    torch.manual_seed(0)
    if source is None:
        model, tokenizer = from_scratch(setting)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        tokenizer.chat_template = None  # trl leaves prompts that are texts as they are
    size = model.get_input_embeddings().num_embeddings
    if not setting.uneven:
        while len(tokenizer) < size:
            tokenizer.add_tokens(f"<unused {len(tokenizer)}>")
        tokenizer.add_special_tokens({"eos_token": "<eos>", "pad_token": "<pad>"})
    elif source is not None:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.eos_token = frequent_token(model, tokenizer, setting)
    else:
        tokenizer.add_special_tokens({"eos_token": f"w{size - 2}", "pad_token": f"w{size - 1}"})
        bias_head(model, {size - 2: odds(1 / MEAN_LENGTH, size - 2), size - 1: -1e4})
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = None
        if setting.uneven:
            config.eos_token_id = tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    words = words_of(tokenizer)
    (directory / WORDS).write_text(json.dumps(words))
    known = tokenizer([prompt(words, setting, i) for i in range(64)], add_special_tokens=False)
    assert {len(ids) for ids in known["input_ids"]} == {setting.prompt_tokens}


def from_scratch(setting: Setting) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Qwen3 with random weights and a tokenizer of words."""
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=3 * setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.key_value_heads,
        head_dim=setting.hidden // setting.heads,
        max_position_embeddings=setting.prompt_tokens + setting.new_tokens,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    core = Tokenizer(WordLevel({f"w{i}": i for i in range(setting.vocabulary)}, unk_token="w0"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, padding_side="left", unk_token="w0", eos_token=None
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer


def odds(probability: float, others: int) -> float:
    """Logit of a token of this probability beside others whose logits are about 0."""
    return math.log(probability / (1 - probability) * others)


@torch.no_grad()
def bias_head(model: PreTrainedModel, biases: Mapping[int, float]) -> None:
    """Give tokens of a Qwen3 with random weights a logit that no context changes much.

    The first number of the hidden states is made the same large one everywhere, so that the head's
    weights of it are biases.
    """
    trunk, head = model.get_decoder(), model.get_output_embeddings()
    model.get_input_embeddings().weight[:, 0] = 4.0
    for layer in trunk.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    hidden = trunk(input_ids=torch.arange(64).view(4, 16)).last_hidden_state[..., 0].mean()
    head.weight[:, 0] = 0.0
    for token, logit in biases.items():
        head.weight[token] = 0.0
        head.weight[token, 0] = logit / hidden


@torch.no_grad()
def frequent_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting
) -> str:
    """The token of the model's own responses whose frequency comes nearest to 1 / MEAN_LENGTH."""
    words = words_of(tokenizer)
    asked = tokenizer([prompt(words, setting, i) for i in range(8)], return_tensors="pt")
    new = 64
    length = {"min_new_tokens": new, "max_new_tokens": new}
    found = model.generate(**asked, **length, do_sample=True, top_k=0)
    counts = found[:, -new:].flatten().bincount(minlength=len(tokenizer))
    counts[tokenizer.all_special_ids] = 0
    token: str = tokenizer.convert_ids_to_tokens(
        int((counts / (new * len(found)) - 1 / MEAN_LENGTH).abs().argmin())
    )
    return token


def words_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words that are a token each, with the space before them."""
    numbers = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    texts = [tokenizer.decode([i]).strip() for i in numbers]
    read = tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
    both = zip(numbers, texts, read, strict=True)
    return [text for i, text, ids in both if text.isalnum() and text.isascii() and ids == [i]]


def prompt(words: Sequence[str], setting: Setting, index: int) -> str:
    """Random words; a pure function of the index."""
    numbers = generator("prompt", index)
    ids = torch.randint(len(words), (setting.prompt_tokens,), generator=numbers)
    return "".join(f" {words[i]}" for i in ids.tolist())


def reward(response: str) -> float:
    """Share of words with an even number, or what counts as one, as their last character."""
    words = response.split()
    return sum(ord(word[-1]) % 2 == 0 for word in words) / max(len(words), 1)


class Clock:
    """Ends of iterations and, within them, the named parts; wall and processor seconds."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[tuple[float, float]] = []
        self.update_began: tuple[float, float] | None = None
        self.words: list[int] = []  # of the responses
        self.before = self.held()
        self.parts: dict[str, tuple[float, float]] = {}
        self.all_parts: list[dict[str, tuple[float, float]]] = []

    def now(self) -> tuple[float, float]:
        """The times when the device has done what was asked of it."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function; its time is that of a part."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            result = function(*args, **kwargs)
            ended = self.now()
            before = self.parts.get(name, (0.0, 0.0))
            spent = _difference(started, ended)
            self.parts[name] = before[0] + spent[0], before[1] + spent[1]
            return result

        return wrapped

    def begin_update(self) -> None:
        """The first update of an iteration begins, unless it has."""
        self.update_began = self.update_began or self.now()

    def end_update(self) -> None:
        """An optimiser step has ended, perhaps the iteration's last."""
        assert self.update_began is not None
        self.parts["update"] = _difference(self.update_began, self.now())

    def end_iteration(self) -> None:
        """An iteration is over."""
        self.ends.append(self.now())
        self.all_parts.append(self.parts)
        self.parts, self.update_began = {}, None

    def rewards(self, responses: Sequence[str]) -> list[float]:
        """The reward of each response."""
        self.words += [len(response.split()) for response in responses]
        return [reward(response) for response in responses]

    def held(self) -> int:
        """The most bytes that were held so far."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return peak_memory()

    def results(self) -> Fields:
        """Of every iteration but the first: wall and processor seconds, and those of its parts."""
        spans = [_difference(start, end) for start, end in pairwise(self.ends)]
        return {
            "seconds": spans,
            "parts": self.all_parts[1:],
            "words": statistics.mean(self.words),
            "peak": self.held() - self.before,
        }


def _difference(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    return end[0] - start[0], end[1] - start[1]


# ----- the contestants, each in a process of its own


def run_ours(
    kind: str,
    setting: Setting,
    model: str,
    device: str,
    iterations: int,
    detailed: bool = False,
    *,
    policy: Mapping[str, Any] = MappingProxyType({}),
    ppo: Mapping[str, Any] = MappingProxyType({}),
    about_to_start: Callable[[], None] = lambda: None,
) -> Fields:
    """Our module in Lightning's trainer.

    ``detailed`` times all the parts, which costs a little; without it, sampling and update.
    ``policy`` and ``ppo`` are options that replace those of the kind; ``about_to_start`` is called
    before the model is read.
    """
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import disable_possible_user_warnings

    import tre_lightning.training.ppo as ppo_steps
    from tre_lightning.batches import PromptBatch
    from tre_lightning.common.malloc import keep_freed_memory
    from tre_lightning.policy.actor_critic import PolicyArgs
    from tre_lightning.sampling.options import RolloutArgs
    from tre_lightning.tasks.base import Prompt, PromptDataModule
    from tre_lightning.training.options import OptimArgs, PPOArgs
    from tre_lightning.training.ppo import PPOModule

    keep_freed_memory()
    disable_possible_user_warnings()
    about_to_start()
    clock = Clock(device)
    words = json.loads((Path(model) / WORDS).read_text())
    padding: dict[str, list[float]] = {}

    class Words(PromptDataModule):
        def train_prompt(self, index: int) -> Prompt:
            return Prompt(prompt(words, setting, index))

        def heldout_prompts(self, stage: str) -> dict[str, list[Prompt]]:
            return {}

        def score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
            return torch.tensor(clock.rewards(responses))

    class Ends(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            clock.end_iteration()
            for tag, value in trainer.callback_metrics.items():
                if tag.endswith("padding_fraction"):
                    padding.setdefault(tag, []).append(float(value))

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if detailed:
                step = trainer.strategy.optimizer_step
                trainer.strategy.optimizer_step = clock.timed("optimiser", step)  # type: ignore[method-assign]

    module = PPOModule(
        policy=PolicyArgs(
            **{"model": model, "critic": "separate" if kind == PPO else "none", **policy}
        ),
        rollout=RolloutArgs(num_responses=RESPONSES, max_new_tokens=setting.new_tokens),
        ppo=PPOArgs(
            **{
                "estimator": "gae" if kind == PPO else "grpo",
                "num_minibatches": UPDATES,
                "kl_coef": KL_COEF if kind == PPO else 0.0,
                **ppo,
            }
        ),
        optim=OptimArgs(lr=LR, critic_lr=LR),
    )
    timed: list[tuple[str, Any, str]] = [("sampling", module, "sample")]
    if detailed:
        timed += [
            ("texts and scores", module, "score"),
            ("texts and scores", ppo_steps, "response_texts"),
            ("evaluation pass", ppo_steps, "evaluate_rollout"),
            ("forward", module, "_loss"),
            ("backward", module, "manual_backward"),
        ]
    for name, owner, function in timed:
        setattr(owner, function, clock.timed(name, getattr(owner, function)))
    update = module._update

    def timed_update(*args: Any) -> None:
        clock.begin_update()
        update(*args)
        clock.end_update()

    module._update = timed_update  # type: ignore[method-assign]
    data = Words(model, batch_size=setting.prompts, iterations_per_epoch=iterations)
    Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if device == "cuda" else "32-true",
        max_epochs=1,
        callbacks=[Ends()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(module, data)
    means = {tag: statistics.mean(values) for tag, values in padding.items()}
    return {**clock.results(), "padding": means}


def run_trl(kind: str, setting: Setting, model: str, device: str, iterations: int) -> Fields:
    """A trainer of trl."""
    import trl
    from transformers import TrainerCallback

    run = grpo_trainer if kind == GRPO else ppo_trainer
    importlib.import_module("trl.trainer.grpo_trainer" if kind == GRPO else "trl.experimental.ppo")
    clock = Clock(device)
    seen = {"steps": 0}
    per_iteration = UPDATES if kind == GRPO else 1  # steps, as the trainer counts them

    class Ends(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen["steps"] += 1
            clock.end_update()
            if seen["steps"] % per_iteration == 0:
                clock.end_iteration()

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy.generate = clock.timed("sampling", policy.generate)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    common: Fields = {
        "per_device_train_batch_size": setting.rows // UPDATES,
        "gradient_accumulation_steps": 1,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": per_iteration,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": device == "cuda",
    }
    words = json.loads((Path(model) / WORDS).read_text())
    prompts = [prompt(words, setting, i) for i in range(iterations * setting.prompts)]
    with tempfile.TemporaryDirectory() as directory:
        common["output_dir"] = directory
        trainer = run(setting, policy, tokenizer, model, common, iterations, prompts, clock)
        trainer.add_callback(Ends())
        trainer.train()
    return {**clock.results(), "trl": trl.__version__}


def grpo_trainer(
    setting: Setting,
    policy: Any,
    tokenizer: Any,
    model: str,
    common: Fields,
    iterations: int,
    prompts: Sequence[str],
    clock: Clock,
) -> Any:
    """The GRPOTrainer of trl."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def rewards(completions: list[str], **_: Any) -> list[float]:
        return clock.rewards(completions)

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            outputs = super()._generate_and_score_completions(inputs)
            clock.begin_update()
            return outputs

    config = GRPOConfig(
        **common,
        max_steps=iterations * UPDATES,
        num_generations=RESPONSES,
        steps_per_generation=UPDATES,
        num_iterations=1,
        max_completion_length=setting.new_tokens,
        temperature=1.0,
        beta=0.0,
        shuffle_dataset=False,
        log_completions=False,
    )
    return Timed(
        model=policy,
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=tokenizer,
    )


class TextReward(torch.nn.Module):
    """The reward function in the form of the reward model that PPOTrainer asks for.

    It makes no hidden states: its "trunk" passes the ids on, its "head" scores their text.
    """

    base_model_prefix = "trunk"

    class Trunk(torch.nn.Module):
        """Passes the ids on."""

        def __init__(self, pad_token_id: int) -> None:
            super().__init__()
            self.pad_token_id = pad_token_id

        def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
            """Ids for hidden states."""
            from transformers.modeling_outputs import BaseModelOutput

            ids = input_ids.where(attention_mask.bool(), self.pad_token_id)  # trl made them 0
            return BaseModelOutput(hidden_states=(ids,))  # type: ignore[arg-type]

    def __init__(self, tokenizer: Any, prompt_tokens: int, clock: Clock) -> None:
        super().__init__()
        self.trunk = self.Trunk(tokenizer.pad_token_id)
        self.tokenizer, self.prompt_tokens, self.clock = tokenizer, prompt_tokens, clock

    def score(self, ids: Tensor) -> Tensor:
        """The same reward at every position, ``[B, T] -> [B, T, 1]``."""
        texts = self.tokenizer.batch_decode(ids[:, self.prompt_tokens :], skip_special_tokens=True)
        rewards = torch.tensor(self.clock.rewards(texts), device=ids.device)
        return rewards[:, None, None].expand(*ids.shape, 1)


def ppo_trainer(
    setting: Setting,
    policy: Any,
    tokenizer: Any,
    model: str,
    common: Fields,
    iterations: int,
    prompts: Sequence[str],
    clock: Clock,
) -> Any:
    """The PPOTrainer of trl."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    config = PPOConfig(
        # Here the rows of a whole iteration, which num_mini_batches divides.
        **{**common, "per_device_train_batch_size": setting.rows},
        total_episodes=iterations * setting.rows,
        num_ppo_epochs=1,
        num_mini_batches=UPDATES,
        local_rollout_forward_batch_size=setting.rows,
        num_sample_generations=0,
        response_length=setting.new_tokens,
        temperature=1.0,
        stop_token="eos" if setting.uneven else None,
        missing_eos_penalty=None,
        kl_coef=KL_COEF,
    )
    ids = [tokenizer(text)["input_ids"] for text in prompts for _ in range(RESPONSES)]
    values = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32
    )
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=TextReward(tokenizer, setting.prompt_tokens, clock),
        value_model=values,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
    )
    accumulate = trainer.accelerator.accumulate  # around every update

    def timed(*models: Any) -> Any:
        clock.begin_update()
        return accumulate(*models)

    trainer.accelerator.accumulate = timed
    return trainer


# ----- all of them


def missing(kind: str, who: str, path: Path | None) -> str | None:
    """Why a contestant cannot run, or None."""
    if who == "ours":
        return None
    root = path / "trl" if path is not None else None
    if root is None:
        found = importlib.util.find_spec("trl")
        if found is None or found.origin is None:
            return "trl is not installed"
        root = Path(found.origin).parent
    if not root.is_dir():
        return f"there is no trl in {path}"
    if kind == PPO and not (root / "experimental" / "ppo").is_dir():
        return "this trl has no PPOTrainer (1.12.0 has); give --trl_ppo"
    return None


def run_apart(
    options: argparse.Namespace, kind: str, who: str, model: str, detailed: bool = False
) -> Fields:
    """Run a contestant in a fresh process.

    Raises:
        RuntimeError: if it fails.
    """
    path = trl_path(options, kind) if who != "ours" else None
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "MKL_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    if path is not None:
        known = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(path.resolve()), *filter(None, [known])])
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        job = {
            "kind": kind,
            "who": who,
            "setting": asdict(setting_of(options)),
            "model": model,
            "device": options.device,
            "iterations": options.iterations + 1,
            "detailed": detailed,
            "result": str(result),
        }
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{kind}, {who} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        fields: Fields = json.loads(result.read_text())
        return fields


def trl_path(options: argparse.Namespace, kind: str) -> Path | None:
    """Directory of the trl that a kind of trainer takes, None = the installed one."""
    path: Path | None = options.trl_ppo if kind == PPO and options.trl_ppo else options.trl
    return path


def do_job(job: Fields) -> None:
    """In the fresh process: run one contestant."""
    common = (
        job["kind"],
        Setting(**job["setting"]),
        job["model"],
        job["device"],
        job["iterations"],
    )
    if job["who"] == "ours":
        found = run_ours(*common, job["detailed"])
    else:
        if job["who"] == "trl, same malloc":
            from tre_lightning.common.malloc import keep_freed_memory

            keep_freed_memory()
        found = run_trl(*common)
    Path(job["result"]).write_text(json.dumps(found))


def medians(kind: str, who: str, runs: Sequence[Fields]) -> Fields:
    """Of the iterations of all repetitions."""
    wall, processor = zip(*(pair for run in runs for pair in run["seconds"]), strict=True)

    def part(name: str) -> float:
        return statistics.median(parts[name][0] for run in runs for parts in run["parts"])

    return {
        "trainer": kind,
        "who": who if "trl" not in runs[0] else who.replace("trl", f"trl {runs[0]['trl']}"),
        "iterations": len(wall),
        "words": statistics.mean(run["words"] for run in runs),
        "s": statistics.median(wall),
        "least": min(wall),
        "most": max(wall),
        "sampling, s": part("sampling"),
        "update, s": part("update"),
        "CPU s": statistics.median(processor),
        "peak, MiB": round(max(run["peak"] for run in runs) / MIB),
    }


def profile(kind: str, run: Fields) -> list[Fields]:
    """Where the time of our iteration goes; the parts of the update are apart."""
    shares = []
    for clock in (0, 1):
        parts = {
            name: statistics.median([one[name][clock] for one in run["parts"]])
            for name in run["parts"][0]
        }
        total = statistics.median([pair[clock] for pair in run["seconds"]])
        inside = sum(parts[name] for name in ("forward", "backward", "optimiser"))
        parts["rest of the update"] = parts.pop("update") - inside
        parts["rest of the iteration"] = total - sum(parts.values())
        shares.append({name: (seconds, seconds / total) for name, seconds in parts.items()})
    wall, processor = shares
    return [
        {
            "trainer": kind,
            "part": name,
            "s": seconds,
            "share": share,
            "CPU s": processor[name][0],
            "share of CPU s": processor[name][1],
        }
        for name, (seconds, share) in wall.items()
    ]


def show(title: str, rows: Sequence[Fields], console: Console) -> None:
    """A table."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    console.print(table)


def machine(options: argparse.Namespace) -> Fields:
    """What it runs on, and how busy that was before."""
    import transformers

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "threads": options.threads,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Run all contestants in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ppo_step"), help="a directory")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--model", type=Path, help="a model's directory, for the one from scratch")
    parser.add_argument("--lengths", choices=("even", "uneven"), default="even")
    parser.add_argument("--prompts", type=int, help="an iteration")
    parser.add_argument("--prompt_tokens", type=int, help="of every prompt")
    parser.add_argument("--new_tokens", type=int, help="of a response, at most")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--repetitions", type=int, default=3, help="processes a contestant")
    parser.add_argument("--iterations", type=int, default=3, help="counted ones a process")
    parser.add_argument("--who", nargs="+", choices=WHO, default=WHO, help="the contestants")
    parser.add_argument("--trl", type=Path, help="a directory with another trl than the installed")
    parser.add_argument("--trl_ppo", type=Path, help="the same for PPOTrainer only")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return do_job(json.loads(options.job))
    console = Console(width=180)
    setting, name = setting_of(options), str(options.model or options.size)
    results: Fields = {"machine": machine(options), "model": name, "setting": asdict(setting)}
    console.print(results["machine"], results["setting"])
    if results["machine"]["load"] > 1.0:
        console.print("warning: the machine is busy; do not publish these numbers")
    running = []
    for kind, who in product((GRPO, PPO), options.who):
        reason = missing(kind, who, trl_path(options, kind))
        if reason is None:
            running.append((kind, who))
        else:
            console.print(f"left out: {kind}, {who}: {reason}")
    runs: dict[tuple[str, str], list[Fields]] = {}
    with tempfile.TemporaryDirectory() as directory:
        save_model(setting, Path(directory), options.model)
        for _ in range(options.repetitions):
            for kind, who in running:
                runs.setdefault((kind, who), []).append(run_apart(options, kind, who, directory))
        detailed = {
            kind: run_apart(options, kind, "ours", directory, detailed=True)
            for kind in (GRPO, PPO)
            if "ours" in options.who
        }
    rows = [medians(kind, who, found) for (kind, who), found in runs.items()]
    first = {row["trainer"]: row for row in reversed(rows)}
    for row in rows:
        for column, unit in {"of the first": "s", "of the first, CPU": "CPU s"}.items():
            row[column] = row[unit] / first[row["trainer"]][unit]
    for kind, run in detailed.items():
        console.print(kind, run["padding"])
    results["rows"], results["raw"] = rows, [list(key) + found for key, found in runs.items()]
    results["profile"] = [row for kind, run in detailed.items() for row in profile(kind, run)]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.lengths}.json").write_text(json.dumps(results, indent=1) + "\n")
    show("seconds an iteration, medians", rows, console)
    if detailed:
        show("where our time goes", results["profile"], console)


if __name__ == "__main__":
    main()
