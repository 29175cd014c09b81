"""What a checkpoint holds of a PPO run besides weights, optimiser and callbacks."""

from typing import TYPE_CHECKING, Any

from tre_lightning.common.distributed import job_id
from tre_lightning.policy.actor_critic import parameter_shapes, refuse_other_model
from tre_lightning.policy.lora import frozen_names

if TYPE_CHECKING:
    from tre_lightning.training.ppo import PPOModule


def add_state(module: "PPOModule", checkpoint: dict[str, Any]) -> None:
    """Add the iteration and the model's shape to a checkpoint; leave out frozen weights."""
    checkpoint["tre_lightning"] = {
        "iteration": module.iteration,
        "shapes": parameter_shapes(module.actor_critic),
        "lora": _lora_state(module),
        "skipped_in_a_row": module.skipped_in_a_row,
        "iterations_an_epoch": module.trainer.num_training_batches,
        "prompts": getattr(module.task, "fingerprint", None),
        "slurm_job": job_id(),
        "kl_coef": None if module.ppo_args.kl_target is None else module.kl_coef,
    }
    if module.policy_args.lora is not None:
        for name in frozen_names(module):
            del checkpoint["state_dict"][name]


def take_state(module: "PPOModule", checkpoint: dict[str, Any]) -> None:
    """Go on where the run of a checkpoint was.

    Raises:
        ValueError: if it is no checkpoint of such a run, or one of another model.
    """
    state = checkpoint.get("tre_lightning")
    if state is None:
        raise ValueError("ckpt_path holds no PPO run of tre_lightning; give one that fit wrote")
    refuse_other_model(parameter_shapes(module.actor_critic), state["shapes"])
    ours = _lora_state(module)
    if state.get("lora") != ours:
        raise ValueError(
            "ckpt_path is a checkpoint of adapters to another model.policy.model or with "
            f"another model.policy.lora ({state.get('lora')} there, {ours} here);"
            " give the checkpoint's own configuration"
        )
    trained = module.state_dict().keys() - frozen_names(module)
    if not module.strict_loading and (lost := trained - checkpoint["state_dict"].keys()):
        raise ValueError(f"ckpt_path lacks {min(lost)}; give another checkpoint")
    module.iteration = state["iteration"]
    module.skipped_in_a_row = state.get("skipped_in_a_row", 0)
    moved = state.get("kl_coef")
    if moved is not None and module.ppo_args.kl_target is not None:
        module.kl_coef = moved


def _lora_state(module: "PPOModule") -> dict[str, Any] | None:
    lora = module.policy_args.lora
    return None if lora is None else {"alpha": lora.alpha, "base": module.base_fingerprint}
