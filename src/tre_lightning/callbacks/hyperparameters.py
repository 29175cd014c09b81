"""TensorBoard's HPARAMS tab: one row per run, with its options and results.

The results are curves of the run: the tab shows their last values, those of the ``test`` command
too, which logs into a folder of the run directory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Trainer
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb
from torch.utils.tensorboard import SummaryWriter

from tre_lightning.callbacks.model_card import describe
from tre_lightning.methods import LossTerm, find_methods
from tre_lightning.training.ppo import PPOModule

Value = bool | float | str

# Of these only memory, speed or the end of a failing run depend.
_LEFT_OUT = {
    "micro_batch_tokens",
    "micro_batch_size",
    "sample_batch_size",
    "fused",
    "logits_memory",
    "max_skipped_updates",
}


def hyperparameters(module: PPOModule, trainer: Trainer) -> dict[str, Value | None]:
    """The options to compare runs by, under the same names in every run. None = not set."""
    methods = find_methods(trainer.callbacks)  # type: ignore[attr-defined]
    terms = [method for method in methods if isinstance(method, LossTerm)]
    regions = [region for term in terms for region in term.regions]
    policy, coef = module.policy_args, terms[0].coef if terms else None
    found: dict[str, Any] = {
        "task": type(trainer.datamodule).__name__,  # type: ignore[attr-defined]
        "task.batch_size": trainer.datamodule.batch_size,  # type: ignore[attr-defined]
        "policy.model": policy.model or (policy.architecture or {}).get("model_type"),
        "policy.critic": policy.critic,
        "policy.lora_rank": None if policy.lora is None else policy.lora.rank,
        "method": " + ".join(map(describe, methods)) or "PPO",
        "method.coef": coef if isinstance(coef, int | float) else None,  # not a schedule
        "method.top_k": regions[0].top_k if regions else None,
        "method.top_p": regions[0].top_p if regions else None,
        "method.min_p": regions[0].min_p if regions else None,
        "seed": module.seed,
    }
    for group in ("rollout", "ppo", "optim"):
        options = asdict(getattr(module, f"{group}_args"))
        found |= {f"{group}.{k}": v for k, v in options.items() if k not in _LEFT_OUT}
    kinds = (bool, int, float, str)
    return {k: v if v is None or isinstance(v, kinds) else str(v) for k, v in found.items()}


def result_tags(module: PPOModule, trainer: Trainer) -> list[tuple[str | None, str]]:
    """The results to show: folder in the run directory (None = the directory itself) and tag."""
    k = module.evaluation_args.num_responses
    names = ["score", *(f"pass@{i}" for i in sorted({1, k}))]
    tags: list[tuple[str | None, str]] = []
    for stage, folder in (("val", None), ("test", "test")):
        for split in trainer.datamodule.heldout_prompts(stage):  # type: ignore[attr-defined]
            tags += [(folder, f"{split}/{name}") for name in names]
    shown = ("full", "region", "region_size", "tail_mass")
    return [*tags, *((None, f"entropy/{name}") for name in shown)]


def add_hyperparameters(
    writer: SummaryWriter,
    name: str,
    found: Mapping[str, Value | None],
    results: Sequence[tuple[str | None, str]],
) -> None:
    """Write the row ``name`` of the HPARAMS tab; unlike ``add_hparams``, without extra curves."""
    columns = [HParam(option) for option in found]
    metrics = [Metric(tag, group=folder, display_name=tag) for folder, tag in results]
    known = {option: value for option, value in found.items() if value is not None}
    events = writer._get_file_writer()
    events.add_summary(hparams_config_pb(columns, metrics))
    events.add_summary(hparams_pb(known, trial_id=name))
    writer.flush()
