"""Checks before any work: whether data, model, devices, loss terms and checkpoint fit together."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.seed import max_seed_value, min_seed_value
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.utilities import rank_zero_warn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from tre_lightning.callbacks.checkpoint import check_states, warn
from tre_lightning.callbacks.monitors import check_monitors
from tre_lightning.cli.trainer_options import check_limits, check_trainer
from tre_lightning.common.errors import read
from tre_lightning.methods import find_methods
from tre_lightning.policy.actor_critic import (
    ActorCritic,
    PolicyArgs,
    load_config,
    parameter_shapes,
    refuse_other_model,
)
from tre_lightning.policy.sharding import check_sharding, shards
from tre_lightning.policy.tokenizers import (
    check_known,
    check_same_words,
    check_special_tokens,
    load_tokenizer,
    vocabulary_size,
    word_tokenizer,
)
from tre_lightning.sampling import check_engine
from tre_lightning.tasks.base import PromptDataModule
from tre_lightning.training.memory_model import GIB, SHAPES, peak_bytes, run_of, shown
from tre_lightning.training.ppo import PPOModule


def check_run(
    module: PPOModule,
    data: PromptDataModule,
    trainer: Trainer,
    policy: PolicyArgs,
    saved_shapes: Mapping[str, list[int]] | None,
    *,
    makes_tokenizer: bool,
) -> None:
    """Refuse a run that could not work, without loading a model.

    Args:
        module: the configured module.
        data: the configured task; its tokenizer is set and its prompts are read.
        trainer: the configured trainer.
        policy: the model to look at, the warm start's where that is still to be trained.
        saved_shapes: parameter shapes in the checkpoint to go on with, where there is one.
        makes_tokenizer: a warm start builds the tokenizer of a new architecture.

    Raises:
        ValueError: naming the field, its value and the fix.
    """
    methods = find_methods(trainer.callbacks)  # type: ignore[attr-defined]
    for method in methods:
        method.check(module, methods)
    check_states(trainer.callbacks)  # type: ignore[attr-defined]
    check_trainer(trainer)
    check_batches(module, data, trainer.world_size)
    given = module.policy_args
    check_sharding(trainer, adapters=given.lora is not None, cpu_offload=given.cpu_offload)
    check_engine(module.rollout_args, trainer.strategy.root_device.type, sharded=shards(trainer))
    if trainer.precision in ("16-mixed", "16-true"):
        raise ValueError(
            f"trainer.precision={trainer.precision} needs a loss scale, which overflows that are "
            "skipped here would leave too high; use bf16-mixed, bf16-true or 32-true"
        )
    ppo = module.ppo_args
    if ppo.kl_coef > 0.0 and ppo.kl_in == "reward" and ppo.kl_estimator != "k1":
        rank_zero_warn(
            f"model.ppo.kl_estimator={ppo.kl_estimator} with model.ppo.kl_in=reward does not pull "
            "the policy back to the reference; k1 there does, as k2 and k3 do in the loss"
        )
    config = load_config(policy)
    named = policy.tokenizer_source
    if named is None and not makes_tokenizer:
        raise ValueError(
            "model.policy.architecture alone has no tokenizer; give model.policy.tokenizer or a "
            "warm_start"
        )
    lora = module.policy_args.lora  # not in the policy of a warm start
    if lora is not None and policy.model is None and not makes_tokenizer:
        raise ValueError(
            "model.policy.lora needs weights to freeze; give model.policy.model or a warm_start, "
            "not model.policy.architecture alone"
        )
    if named is None:
        tokenizer = word_tokenizer(data.vocabulary(), config)
    else:
        tokenizer = read("model.policy.tokenizer", named, load_tokenizer)
    known = vocabulary_size(config)
    check_special_tokens(tokenizer, known, f"model.policy.tokenizer={named}")
    if policy.critic_model is not None:
        check_critic(policy.critic_model, tokenizer, known)
    data.vocabulary_size = known
    data.check(tokenizer)
    check_limits(trainer, data)
    check_monitors(trainer, module, data)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    new_tokens = module.rollout_args.max_new_tokens
    if context is not None and data.longest_prompt + new_tokens > context:
        raise ValueError(
            f"model.rollout.max_new_tokens={new_tokens} and the longest prompt of "
            f"{data.longest_prompt} tokens exceed the model's context of {context} tokens; lower "
            "it or drop long prompts"
        )
    try:
        shapes = expected_shapes(replace(policy, lora=lora), config)
    except Exception as error:  # a model may raise anything at what it does not like
        if str(error).startswith("model.policy."):
            raise
        raise ValueError(
            f"{policy.name} cannot be built; change its configuration, or give another model "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error
    if saved_shapes is not None:
        refuse_other_model(shapes, saved_shapes)


def check_critic(model: str, tokenizer: PreTrainedTokenizerBase, known: int | None) -> None:
    """Refuse a ``critic_model`` that cannot read the tokens of the policy.

    Args:
        model: its directory or hub name.
        tokenizer: the policy's.
        known: tokens that the policy knows; None = not known.

    Raises:
        ValueError: naming the field, its value and the fix.
    """
    field = "model.policy.critic_model"
    size = vocabulary_size(read(field, model, AutoConfig.from_pretrained))
    said = (i for i in tokenizer.get_vocab().values() if known is None or i < known)
    check_known(said, tokenizer, size, f"{field}={model}: the policy's token")
    try:
        other = load_tokenizer(model)
    except Exception:  # it needs none
        return
    check_same_words(tokenizer, other, f"{field}={model}")


def check_length(trainer: Trainer) -> None:
    """Refuse a ``fit`` whose limits contradict each other.

    Raises:
        ValueError: naming the field.
    """
    for kind in ("epochs", "steps"):
        least, most = getattr(trainer, f"min_{kind}"), getattr(trainer, f"max_{kind}")
        if least is not None and most is not None and 0 <= most < least:
            raise ValueError(f"trainer.min_{kind}={least} is above trainer.max_{kind}={most}")


def check_resumed(
    module: PPOModule, data: PromptDataModule, trainer: Trainer, saved: Mapping[str, Any]
) -> None:
    """Refuse to resume with another length than the checkpoint has, and warn of other prompts.

    Args:
        module: the configured module.
        data: the configured task, checked.
        trainer: the configured trainer.
        saved: what :func:`tre_lightning.callbacks.checkpoint.saved_run` found.

    Raises:
        ValueError: naming the field, its value and the fix.
    """
    now, before = _iterations_an_epoch(data, trainer), saved["iterations_an_epoch"]
    if before is not None and now != before:
        raise ValueError(
            f"data.iterations_per_epoch={data.iterations_per_epoch} with "
            f"trainer.limit_train_batches={trainer.limit_train_batches} makes {now} iterations an "
            f"epoch, and the checkpoint is of a run of {before}; give what it had, and another "
            "trainer.max_epochs for another length"
        )
    done, epochs, steps = saved["iteration"], trainer.max_epochs, trainer.max_steps
    if epochs is not None and 0 <= epochs * now < done:
        raise ValueError(
            f"trainer.max_epochs={epochs} of {now} iterations is less than the checkpoint's "
            f"{done} iterations; give more epochs, or an earlier checkpoint"
        )
    if steps >= 0 and saved["global_step"] >= steps + module.steps_a_batch:
        raise ValueError(
            f"trainer.max_steps={steps} is less than the checkpoint's {saved['global_step']} "
            "optimiser steps; give more steps, or an earlier checkpoint"
        )
    if saved["prompts"] not in (None, data.fingerprint):
        warn(
            "the training prompts are not those of the checkpoint's run: its data, their files or "
            f"seed_everything changed; they count from iteration {done + 1} on"
        )


def _iterations_an_epoch(data: PromptDataModule, trainer: Trainer) -> int:
    limit, whole = trainer.limit_train_batches, data.iterations_per_epoch
    return min(limit, whole) if isinstance(limit, int) else int(limit * whole)


def check_seed(seed: int) -> None:
    """Refuse a seed that torch and numpy do not both take.

    Raises:
        ValueError: naming the field, its value and the fix.
    """
    if not min_seed_value <= seed <= max_seed_value:
        raise ValueError(
            f"seed_everything={seed} must lie between {min_seed_value} and {max_seed_value}"
        )


def check_devices(accelerator: str, devices: object) -> None:
    """Refuse GPUs that this machine does not have.

    Args:
        accelerator: of the trainer.
        devices: of the trainer; only a number is looked at.

    Raises:
        ValueError: naming the field, its value and the fix.
    """
    if accelerator not in ("gpu", "cuda") or MPSAccelerator.is_available():
        return
    there = CUDAAccelerator.auto_device_count()
    if there == 0:
        raise ValueError(
            f"trainer.accelerator={accelerator}, and this machine has no GPU that torch can use; "
            "give --trainer.accelerator cpu after the files of configs/scale, or leave them out"
        )
    if isinstance(devices, int) and devices > there:
        raise ValueError(
            f"trainer.devices={devices}, and this machine has {there} GPU(s); give "
            f"--trainer.devices {there}"
        )


def check_memory(config: Mapping[str, Any]) -> None:
    """Refuse a run that does not fit this machine's GPU, before a model is downloaded.

    Only models whose shape is known by name are looked at. What is estimated is the least: a run
    that passes may still not fit.

    Args:
        config: of ``fit``, as plain containers.

    Raises:
        ValueError: with the estimate and the fix.
    """
    trainer, policy = config["trainer"], config["model"]["policy"]
    name = policy.get("model")
    if trainer["accelerator"] not in ("auto", "gpu", "cuda") or name not in SHAPES:
        return
    if policy.get("cpu_offload") or not torch.cuda.is_available():
        return
    run = run_of(config)
    needed, there = peak_bytes(run)["peak"], torch.cuda.get_device_properties(0).total_memory
    if needed > there:
        raise ValueError(
            f"model.policy.model={name} needs about {needed / GIB:.1f} GiB a device in this run "
            f"(estimated: {shown(run)}), and this GPU has {there / GIB:.1f} GiB; lower "
            "model.rollout.sample_batch_size or model.ppo.micro_batch_tokens, add --config "
            "configs/memory/lora.yaml, or take a file of configs/recipes for this size"
        )


def warn_of_slow_bfloat16(trainer: Trainer, cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Warn where a processor is to compute in bfloat16 and has no instructions for it."""
    if "bf16" not in str(trainer.precision) or trainer.strategy.root_device.type != "cpu":
        return
    if not cpuinfo.exists() or re.search(r"bf16\b", cpuinfo.read_text()):  # not known; has them
        return
    warn(
        f"trainer.precision={trainer.precision} is slower than 32-true here, as this CPU has no "
        "bfloat16 instructions (three times, measured on one); give --trainer.precision 32-true"
    )


def check_batches(module: PPOModule, data: PromptDataModule, devices: int) -> None:
    """Raise ValueError unless every device has a response in every minibatch."""
    if data.batch_size < devices:
        raise ValueError(
            f"data.batch_size={data.batch_size} must be at least one prompt for each of the "
            f"{devices} devices"
        )
    minibatches, responses = module.ppo_args.num_minibatches, module.rollout_args.num_responses
    if data.batch_size * responses < minibatches * devices:
        raise ValueError(
            f"model.ppo.num_minibatches={minibatches} is too many for data.batch_size="
            f"{data.batch_size} x model.rollout.num_responses={responses} responses on "
            f"{devices} device(s): every minibatch needs one for each; lower it"
        )
    if module.ppo_args.minibatches_by == "prompt" and data.batch_size < minibatches:
        raise ValueError(
            f"model.ppo.num_minibatches={minibatches} is too many for data.batch_size="
            f"{data.batch_size} prompts with model.ppo.minibatches_by=prompt: every minibatch "
            "needs one; lower it, or give minibatches_by=response"
        )


def expected_shapes(policy: PolicyArgs, config: PreTrainedConfig) -> dict[str, list[int]]:
    """Shape of every parameter that a run on ``policy`` has, without loading or building it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        critic = None
        if policy.critic_model is not None:
            critic = AutoModel.from_config(AutoConfig.from_pretrained(policy.critic_model))
        return parameter_shapes(ActorCritic.build(policy, model, critic))
