"""Memory and time of a PPO iteration, by formulas: what a run needs, before it is started.

Memory counts weights, gradients, AdamW's moments, activations kept for the backward pass, one chunk
of logits, and in sampling the key-value cache. Time counts multiplications and additions of matrix
products and attention. What is small is left out, and any communication between devices.
``benchmarks/memory.py`` holds both against measurements; docs/scaling.md has them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tre_lightning.training.options import MICRO_BATCH_TOKENS

MIB, GIB = 2**20, 2**30
LOGITS = 128 * MIB  # ppo.logits_memory
Critic = Literal["separate", "shared", "none"]
# Activations with adapters, of those without. Measured: the peak was 1.94 times what this model
# said without it, and is 1.15 times with it; where they come from is not known.
ADAPTER_ACTIVATIONS = 2.0


@dataclass(frozen=True)
class Model:
    """Shape of a Qwen2- or Qwen3-like transformer."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = False  # the head is the embedding
    normed_heads: bool = False  # queries and keys are normalised, as in Qwen3

    @property
    def attention(self) -> int:
        """Numbers in the queries of a token."""
        return self.hidden

    @property
    def keys(self) -> int:
        """Numbers in the keys of a token, and in its values."""
        return self.hidden // self.heads * self.key_value_heads

    @property
    def layer_weights(self) -> int:
        """Parameters of a layer's matrices."""
        attention = 2 * self.hidden * (self.attention + self.keys)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def trunk(self) -> int:
        """Parameters in matrix products of the trunk."""
        return self.layers * self.layer_weights

    @property
    def table(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def policy(self) -> int:
        """Parameters of the language model (norms and biases left out)."""
        return self.trunk + (1 if self.tied else 2) * self.table


@dataclass(frozen=True)
class Run:
    """What is held and done in an iteration, on one of ``devices`` that share it evenly."""

    model: Model
    rows: int  # responses on a device that are sampled at a time
    micro_rows: int  # responses in a forward and backward pass
    prompt_tokens: int
    new_tokens: int
    critic: Critic = "separate"
    checkpointing: bool = False
    lora_rank: int = 0  # 0 = all weights are trained
    mixed: bool = False  # products in bfloat16 over float32 weights (bf16-mixed)
    devices: int = 1  # over which weights and optimiser are sharded (FSDP2); not with adapters

    @property
    def tokens(self) -> int:
        """Of a prompt and its response."""
        return self.prompt_tokens + self.new_tokens

    @property
    def sharded(self) -> bool:
        """With adapters, every device holds all weights (DDP)."""
        return self.devices > 1 and not self.lora_rank


# ----- memory, bytes


def trained_and_frozen(run: Run) -> tuple[int, int]:
    """Parameters that are trained, and that are only held.

    A separate critic is a copy of the trunk and the embedding. With adapters it shares the frozen
    weights.
    """
    model = run.model
    copies = 2 if run.critic == "separate" else 1
    if run.lora_rank:
        d, a, k, i = model.hidden, model.attention, model.keys, model.intermediate
        sides = (d + a) + 2 * (d + k) + (a + d) + 2 * (d + i) + (i + d)
        return copies * model.layers * run.lora_rank * sides, model.policy
    return model.policy + (copies - 1) * (model.trunk + model.table), 0


def state_bytes(run: Run) -> dict[str, float]:
    """Of one device: weights, gradients and AdamW's two moments, all float32.

    Frozen weights are float32 without mixed precision, and bfloat16 with it
    (``lora.bfloat16_base``).
    """
    trained, frozen = trained_and_frozen(run)
    share = 1 / run.devices if run.sharded else 1.0
    return {
        "weights": share * (4 * trained + (2 if run.mixed else 4) * frozen),
        "gradients": share * 4 * trained,
        "moments": share * 8 * trained,
    }


def activation_floats(model: Model) -> int:
    """Numbers that a layer keeps of a token for its backward pass.

    Of each norm its input, the normalised and the scaled vector; queries before and after rotation
    (and of normalised heads two more, likewise of keys), keys and values repeated for all heads,
    the attention's output; in the MLP the gate, its activation, the other branch and the product.
    """
    norms = 6 * model.hidden
    heads = 2 * (model.attention + model.keys) if model.normed_heads else 0
    attention = 4 * model.attention
    return norms + heads + attention + 4 * model.intermediate


def activation_bytes(run: Run) -> float:
    """Kept in the forward pass of a micro-batch, by policy and separate critic at once.

    With checkpointing: of each layer its input, and of one layer everything. Mixed precision halves
    all but the norms, which run in float32. Adapters keep more, see ``ADAPTER_ACTIVATIONS``.
    """
    model, tokens = run.model, run.micro_rows * run.tokens
    width = 2.0 if run.mixed else 4.0
    layer = width * activation_floats(model) + (2 * 6 * model.hidden if run.mixed else 0)
    if run.lora_rank:
        layer *= ADAPTER_ACTIVATIONS
    of_token = model.layers * layer
    if run.checkpointing:
        of_token = model.layers * width * model.hidden + layer
    return tokens * of_token * (2 if run.critic == "separate" else 1)


def logits_bytes(run: Run) -> float:
    """A chunk of logits and its working copy, in float32."""
    tokens = run.micro_rows * run.new_tokens
    return 2.0 * min(LOGITS, 4 * tokens * run.model.vocabulary)


def sampling_bytes(run: Run) -> dict[str, float]:
    """Key-value cache, with a layer's copy while it grows, and the next token's distribution.

    That takes 12 bytes a token of the vocabulary: logits twice and probabilities, in float32. A
    sharded policy is gathered whole; one that is trained in mixed precision is there in bfloat16,
    too.
    """
    model, width = run.model, 2 if run.mixed else 4
    cache = width * run.rows * run.tokens * 2 * model.keys
    return {
        "gathered policy": float(width * model.policy if run.sharded else 0),
        "cast policy": float(2 * model.policy if _casts(run) else 0),
        "cache": float(cache * (model.layers + 1)),
        "choice": 12.0 * run.rows * model.vocabulary,
    }


def _casts(run: Run) -> bool:
    """Whether autocast keeps weights in bfloat16 beside those in float32."""
    return run.mixed and not run.sharded and not run.lora_rank


def peak_bytes(run: Run) -> dict[str, float]:
    """Peak of one device and its parts.

    States are held throughout: gradients are there during sampling too, and beside the activations
    from the second micro-batch of a step on. On top comes the larger of sampling and update. In the
    update of sharded weights one layer is gathered, in the type of the products, three times
    (forward, prefetched, gradient).
    """
    states, sampling = state_bytes(run), sampling_bytes(run)
    layer = max(run.model.layer_weights, run.model.table)
    update = {
        "activations": activation_bytes(run),
        "logits": logits_bytes(run),
        "gathered layers": 3.0 * (2 if run.mixed else 4) * layer if run.sharded else 0.0,
        "cast weights": 2.0 * trained_and_frozen(run)[0] if _casts(run) else 0.0,
    }
    extra = max(sum(sampling.values()), sum(update.values()))
    return {**states, **sampling, **update, "peak": sum(states.values()) + extra}


# ----- time, floating-point operations


def attention_flops(model: Model, queries: float, context: float) -> float:
    """Scores and weighted values of all layers."""
    return 4.0 * model.layers * model.attention * queries * context


def sampling_flops(run: Run, responses: int, prompts: int) -> float:
    """2 a parameter and token; a prompt is read once for all its responses."""
    model = run.model
    read = prompts * 2.0 * (run.prompt_tokens * model.trunk + model.table)
    steps = responses * (run.new_tokens - 1)
    written = steps * 2.0 * (model.trunk + model.table)
    context = run.prompt_tokens + run.new_tokens / 2
    return read + written + attention_flops(model, steps, context)


def forward_flops(run: Run, responses: int, head: bool = True) -> float:
    """One forward pass over prompts and responses; the head on the responses only.

    torch's attention computes the masked half too where it is given a mask, so it is counted whole.
    """
    model = run.model
    trunk = 2.0 * run.tokens * model.trunk + attention_flops(model, run.tokens, run.tokens)
    return responses * (trunk + (2.0 * run.new_tokens * model.table if head else 0.0))


def evaluation_flops(run: Run, responses: int) -> float:
    """Policy and, if there is one, critic; no reference."""
    critic = forward_flops(run, responses, head=False) if run.critic == "separate" else 0.0
    return forward_flops(run, responses) + critic


def update_flops(run: Run, responses: int) -> float:
    """Forward and twice that backward, once more forward with checkpointing.

    Frozen matrices have no gradient of their own: backward is once. The head is never computed
    twice.
    """
    trunk = forward_flops(run, responses, head=False)
    head = forward_flops(run, responses) - trunk
    frozen = run.lora_rank > 0
    passes = (2.0 if frozen else 3.0) + (1.0 if run.checkpointing else 0.0)
    models = 2 if run.critic == "separate" else 1
    return models * passes * trunk + (2.0 if frozen else 3.0) * head


@dataclass(frozen=True)
class Device:
    """An accelerator, and what share of its peaks is assumed to be reached."""

    flops: float = 989e12  # H100 SXM, dense bfloat16
    bandwidth: float = 3.35e12  # bytes a second
    compute_fraction: float = 0.4  # MFU of evaluation and update
    bandwidth_fraction: float = 0.6  # of sampling, which reads weights and cache once a token


def device_seconds(run: Run, responses: int, prompts: int, device: Device) -> dict[str, float]:
    """Seconds of an iteration's phases on ``run.devices``, communication not counted.

    Sampling takes the longer of arithmetic and reading: every step reads the weights, from the
    device's own memory, and the cache of its rows, ``run.rows`` at a time.
    """
    model, width = run.model, 2
    speed = device.flops * device.compute_fraction
    own = responses / run.devices
    turns = max(1.0, own / run.rows)
    weights = width * (model.trunk + model.table)
    context = run.prompt_tokens + run.new_tokens / 2
    cache = width * min(run.rows, own) * context * 2 * model.keys * model.layers
    reading = turns * run.new_tokens * (weights + cache)
    share = prompts / run.devices
    return {
        "sampling": max(
            sampling_flops(run, 1, 0) * own / speed
            + (sampling_flops(run, 1, 1) - sampling_flops(run, 1, 0)) * share / speed,
            reading / (device.bandwidth * device.bandwidth_fraction),
        ),
        "evaluation": evaluation_flops(run, 1) * own / speed,
        "update": update_flops(run, 1) * own / speed,
    }


SHAPES = {  # of the published configurations
    "Qwen/Qwen2.5-0.5B-Instruct": Model(24, 896, 4864, 14, 2, 151936, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": Model(28, 1536, 8960, 12, 2, 151936, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": Model(28, 3584, 18944, 28, 4, 152064),
    "Qwen/Qwen2.5-72B-Instruct": Model(80, 8192, 29568, 64, 8, 152064),
}


def run_of(config: Mapping[str, Any], shape: Model | None = None) -> Run:
    """What a configuration comes to on one of its devices: the longest prompts and responses.

    Args:
        config: of ``fit``, as plain containers.
        shape: of the policy; None = that of its name among ``SHAPES``.

    Raises:
        KeyError: for another name, or an option that is not given.
    """
    model, data, trainer = config["model"], config["data"]["init_args"], config["trainer"]
    policy, rollout = model["policy"], model["rollout"]
    devices = device_count(trainer)
    responses = max(data["batch_size"] * rollout["num_responses"] // devices, 1)
    prompt_tokens, new_tokens = data["max_prompt_length"], rollout["max_new_tokens"]
    strategy = trainer.get("strategy")
    sharded = isinstance(strategy, Mapping) and "ModelParallel" in strategy["class_path"]
    return Run(
        SHAPES[policy["model"]] if shape is None else shape,
        rows=min(rollout.get("sample_batch_size") or responses, responses),
        micro_rows=min(_micro_rows(model["ppo"], prompt_tokens + new_tokens), responses),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        critic=policy["critic"],
        checkpointing=policy.get("gradient_checkpointing", False),
        lora_rank=(policy.get("lora") or {}).get("rank", 0),
        mixed=trainer["precision"] in ("bf16-mixed", "16-mixed"),
        devices=devices if sharded else 1,
    )


def device_count(trainer: Mapping[str, Any]) -> int:
    """Devices of all nodes by the options of the trainer; what is no number counts as 1 a node."""
    given = str(trainer.get("devices"))
    return (int(given) if given.isdecimal() and int(given) > 0 else 1) * (
        trainer.get("num_nodes") or 1
    )


def _micro_rows(ppo: Mapping[str, Any], tokens: int) -> int:
    """Responses of the largest size in a pass over the policy."""
    most, rows = ppo.get("micro_batch_tokens"), ppo.get("micro_batch_size")
    if most is None and rows is not None:
        return int(rows)
    fitting = max((most or MICRO_BATCH_TOKENS) // tokens, 1)
    return fitting if rows is None else min(fitting, int(rows))


def shown(run: Run) -> str:
    """The parts of the memory of one device in one line, GiB."""
    parts = peak_bytes(run)
    states = sum(parts[name] for name in ("weights", "gradients", "moments"))
    sampling = sum(parts[name] for name in ("gathered policy", "cast policy", "cache", "choice"))
    update = sum(
        parts[name] for name in ("activations", "logits", "gathered layers", "cast weights")
    )
    named = {"states": states, "sampling": sampling, "update": update, "peak": parts["peak"]}
    return ", ".join(f"{name} {value / GIB:.1f}" for name, value in named.items())
