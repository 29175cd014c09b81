"""PPO as a LightningModule: one ``training_step`` is one PPO iteration.

prompts -> rollout -> scores -> advantages -> minibatches -> loss terms -> metrics. The module knows
no entropy method: methods are :class:`~tre_lightning.methods.Method` callbacks.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase

from tre_lightning.batches import Experience, PromptBatch, Rollout, TrainingBatch, sequence_inputs
from tre_lightning.common.distributed import agreed, highest, job_id, world
from tre_lightning.common.metrics import MaskedMean
from tre_lightning.common.precision import float32_or_better
from tre_lightning.common.validation import options
from tre_lightning.entropy import EntropyStats
from tre_lightning.methods.hooks import (
    LossTerm,
    Method,
    PolicyOutputs,
    find_methods,
    loss_terms,
    shaped,
    weighed,
)
from tre_lightning.ops import Region
from tre_lightning.policy.actor_critic import (
    ActorCritic,
    PolicyArgs,
    parameter_shapes,
    refuse_other_model,
)
from tre_lightning.policy.encoding import textless_tokens
from tre_lightning.policy.head import Head, HeadInput
from tre_lightning.policy.lora import fingerprint, frozen_names, without_adapters
from tre_lightning.policy.sharding import shards, whole
from tre_lightning.policy.tokenizers import end_tokens, load_tokenizer
from tre_lightning.sampling import Sampling, make_engine
from tre_lightning.sampling.options import EvaluationArgs, RolloutArgs
from tre_lightning.training.advantages import check_estimator
from tre_lightning.training.diagnostics import Evaluations, RolloutMetrics, UpdateMetrics
from tre_lightning.training.kl import next_kl_coef
from tre_lightning.training.losses import masked_sum, value_loss
from tre_lightning.training.mismatch import corrected
from tre_lightning.training.nonfinite import all_finite, end_of_run, nan_gradient_if_nonfinite
from tre_lightning.training.objective import PolicyObjective
from tre_lightning.training.optim import total_batches
from tre_lightning.training.options import DiagnosticsArgs, OptimArgs, PPOArgs
from tre_lightning.training.targets import build_experience, compute_targets, minibatches
from tre_lightning.training.task import Task, scores_of

T = TypeVar("T")


class PPOModule(LightningModule):
    """Proximal policy optimisation of a causal language model, with a critic or without.

    The model is built in ``configure_model``; until then ``actor_critic`` does not exist.

    Example:
        >>> module = PPOModule(policy={"model": "my/model"}, ppo={"num_epochs": 2})
        >>> module.ppo_args.num_epochs, module.rollout_args.num_responses
        (2, 8)
    """

    actor_critic: ActorCritic
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        policy: PolicyArgs = PolicyArgs(),
        rollout: RolloutArgs = RolloutArgs(),
        evaluation: EvaluationArgs = EvaluationArgs(),
        ppo: PPOArgs = PPOArgs(),
        optim: OptimArgs = OptimArgs(),
        diagnostics: DiagnosticsArgs = DiagnosticsArgs(),
        seed: int = 42,
    ) -> None:
        """Keep the options; nothing is loaded yet.

        Args:
            policy: which model is trained.
            rollout: how responses are sampled.
            evaluation: how held-out prompts are answered.
            ppo: the update.
            optim: the optimiser.
            diagnostics: the region of the entropy diagnostics.
            seed: of sampling and shuffling.
        """
        super().__init__()
        self.automatic_optimization = False
        self.policy_args = options(PolicyArgs, policy)
        self.rollout_args = options(RolloutArgs, rollout)
        self.evaluation_args = options(EvaluationArgs, evaluation)
        self.ppo_args = options(PPOArgs, ppo)
        self.optim_args = options(OptimArgs, optim)
        self.diagnostics_args = options(DiagnosticsArgs, diagnostics)
        check_estimator(
            self.ppo_args.estimator, self.policy_args.critic, self.rollout_args.num_responses
        )
        self.seed = seed
        self.iteration = 0  # finished PPO iterations
        self.skipped_in_a_row = 0  # updates that were not finite
        self.kl_coef = self.ppo_args.kl_coef  # of this iteration
        self._reference: list[ActorCritic] = []  # a list, so that no checkpoint holds it
        self._engine = make_engine(self.rollout_args)
        self._base: str | None = None  # hash of the frozen weights beneath adapters
        self._rollout_metrics = RolloutMetrics(self.rollout_args.num_responses)
        self._update_metrics = UpdateMetrics()
        self._evaluations = Evaluations(self.evaluation_args.num_responses)
        groups = ("policy", "rollout", "evaluation", "ppo", "optim", "diagnostics")
        plain = {name: asdict(getattr(self, f"{name}_args")) for name in groups}
        self.save_hyperparameters({**plain, "seed": seed}, logger=False)

    # ----- model and optimiser

    def configure_model(self) -> None:
        """Load the policy, its tokenizer, the critic and, for a KL penalty, the reference."""
        if hasattr(self, "actor_critic"):
            return
        self.actor_critic = ActorCritic.load(self.policy_args, self.seed)
        self.actor_critic.try_out(self.policy_args)
        source = self.policy_args.tokenizer_source
        if source is None:
            raise ValueError(
                "model.policy.architecture needs model.policy.tokenizer, or a warm_start"
            )
        self.tokenizer = load_tokenizer(source)
        if self.policy_args.lora is not None:
            self.strict_loading = False  # checkpoints leave out what is frozen
            self._base = fingerprint(self.actor_critic)
        trainer = self._trainer  # a module that is looked at has none
        methods = [] if trainer is None else find_methods(trainer.callbacks)  # type: ignore[attr-defined]
        if self.ppo_args.kl_coef != 0.0 or any(m.needs_reference for m in methods):
            reference = self.actor_critic.policy  # without its adapters
            if self.policy_args.lora is None:
                reference = copy.deepcopy(reference).requires_grad_(False)
            self._reference = [ActorCritic(reference, None, has_values=False)]
        if self.device_mesh is not None:  # of a strategy that shards
            for model in (self.actor_critic, *self._reference):
                model.shard(
                    self.device_mesh.device_type,
                    str(self.trainer.precision),
                    cpu_offload=self.policy_args.cpu_offload,
                )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimiser, so that ``global_step`` counts every step once."""
        optim = self.optim_args
        groups = [{"params": params, "lr": lr} for params, lr in self._parameter_groups()]
        return torch.optim.AdamW(
            groups, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )

    def _parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Parameters and peak learning rate of the policy and, if there is one, the critic."""
        model, optim = self.actor_critic, self.optim_args
        groups = [(model.policy_parameters(), optim.lr)]
        critic = model.critic_parameters()
        return [*groups, (critic, optim.critic_lr)] if critic else groups

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the iteration and the model's shape; leave out frozen weights."""
        checkpoint["tre_lightning"] = {
            "iteration": self.iteration,
            "shapes": parameter_shapes(self.actor_critic),
            "lora": self._lora_state(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "iterations_an_epoch": self.trainer.num_training_batches,
            "prompts": getattr(self._task, "fingerprint", None),
            "slurm_job": job_id(),
            "kl_coef": None if self.ppo_args.kl_target is None else self.kl_coef,
        }
        if self.policy_args.lora is not None:
            for name in frozen_names(self):
                del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the iteration; refuse a checkpoint of another model."""
        state = checkpoint.get("tre_lightning")
        if state is None:
            raise ValueError("ckpt_path holds no PPO run of tre_lightning; give one that fit wrote")
        refuse_other_model(parameter_shapes(self.actor_critic), state["shapes"])
        if state.get("lora") != self._lora_state():
            raise ValueError(
                "ckpt_path is a checkpoint of adapters to another model.policy.model or with "
                f"another model.policy.lora ({state.get('lora')} there, {self._lora_state()} here);"
                " give the checkpoint's own configuration"
            )
        trained = self.state_dict().keys() - frozen_names(self)
        if not self.strict_loading and (lost := trained - checkpoint["state_dict"].keys()):
            raise ValueError(f"ckpt_path lacks {min(lost)}; give another checkpoint")
        self.iteration = state["iteration"]
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        moved = state.get("kl_coef")
        if moved is not None and self.ppo_args.kl_target is not None:
            self.kl_coef = moved

    def _lora_state(self) -> dict[str, Any] | None:
        lora = self.policy_args.lora
        return None if lora is None else {"alpha": lora.alpha, "base": self._base}

    # ----- one iteration

    @property
    def steps_a_batch(self) -> int:
        """Optimiser steps of an iteration, if none is skipped."""
        return self.ppo_args.num_epochs * self.ppo_args.num_minibatches

    @float32_or_better()
    def training_step(self, prompts: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """One PPO iteration; gives callbacks the entropies of the rollout, ``[B, T]`` each."""
        started = time.perf_counter()
        methods = find_methods(self.trainer.callbacks)  # type: ignore[attr-defined]
        share = self.optim_args.lr_fraction(self.iteration, total_batches(self.trainer))
        rollout = self._sample(prompts, self.rollout_args)
        scores = self._score(self._texts(rollout), prompts)
        sampled = time.perf_counter()

        experience, entropies, scales = self._evaluate_rollout(rollout, scores, methods)
        self._rollout_metrics.update_scores(experience, binary=self._task.binary_scores)
        self._rollout_metrics.update_timeouts(self._task.scorer_timeouts())
        batch = compute_targets(
            experience.gathered(),
            estimator=self.ppo_args.estimator,
            num_responses=self.rollout_args.num_responses,
            gamma=self.ppo_args.gamma,
            gae_lambda=self.ppo_args.gae_lambda,
            kl_coef=self.kl_coef if self.ppo_args.kl_in == "reward" else 0.0,
            kl_estimator=self.ppo_args.kl_estimator,
            whiten=self.ppo_args.whiten_advantages,
        )
        for method in methods:
            method.adapt(batch)
        batch = corrected(shaped(batch, methods), self.rollout_args.max_importance_weight)
        self._update_metrics.update_targets(batch)
        for epoch in range(self.ppo_args.num_epochs):
            key = ("minibatches", self.seed, self.iteration, epoch)
            cut = minibatches(batch, self.ppo_args.num_minibatches, *key)
            for number, minibatch in enumerate(cut):
                self._update(weighed(minibatch, methods, (*key, number)), methods, share)

        values = {**self._rollout_metrics.flush(), **self._update_metrics.flush()}
        values |= self._method_values(methods, scales)
        values["policy/lr"] = share * self.optim_args.lr
        if self.kl_coef != 0.0:
            values["policy/kl_coef"] = self.kl_coef
            self._steer_kl(float(values["rollout/ref_kl"]), len(batch))
        if batch.values is not None:
            values["value/lr"] = share * self.optim_args.critic_lr
        values["rollout/seconds"] = sampled - started
        values["policy/update_seconds"] = time.perf_counter() - sampled
        self.log_dict(values, logger=False, batch_size=1)  # for callbacks and progress bar
        if (self.iteration + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            # Lightning would log after the iteration's checkpoint: a kill in between would lose it.
            with agreed():  # the first rank alone writes
                for logger in self.loggers:
                    logger.log_metrics(values, step=self.iteration)
                    logger.save()
        self.iteration += 1
        return {"entropies": entropies, "response_mask": rollout.response_mask}

    def _steer_kl(self, kl: float, responses: int) -> None:
        """Set the next iteration's coefficient from the global rollout, on all ranks alike."""
        ppo = self.ppo_args
        if ppo.kl_target is not None:
            self.kl_coef = next_kl_coef(
                self.kl_coef, kl, target=ppo.kl_target, responses=responses, horizon=ppo.kl_horizon
            )

    def _sample(self, prompts: PromptBatch, how: RolloutArgs | EvaluationArgs) -> Rollout:
        sampling = Sampling(
            num_responses=how.num_responses,
            max_new_tokens=self.rollout_args.max_new_tokens,
            eos_token_ids=end_tokens(self.actor_critic.policy, self.tokenizer),
            pad_token_id=int(self.tokenizer.pad_token_id),
            seed=self.seed,
            temperature=how.temperature,
            top_p=how.top_p if isinstance(how, EvaluationArgs) else 1.0,
            sample_batch_size=self.rollout_args.sample_batch_size,
        )
        return self.actor_critic.sample(
            lambda policy: self._engine.sample(policy, prompts, sampling)
        )

    def _texts(self, rollout: Rollout) -> list[str]:
        """The responses without the token that ended them and the padding behind it."""
        counted = _before_the_end(rollout).sum(1).tolist()
        rows = zip(rollout.response_ids.tolist(), counted, strict=True)
        ids = [row[:length] for row, length in rows]
        return list(self.tokenizer.batch_decode(ids, skip_special_tokens=False))

    def _invalid(self, rollout: Rollout) -> Tensor:
        """Whether a response has a token that stands for no text, ``[B]`` bool."""
        ids = rollout.response_ids
        textless = torch.tensor(self._textless, device=ids.device)
        invalid = (ids >= len(self.tokenizer)) | torch.isin(ids, textless)
        return (invalid & _before_the_end(rollout)).any(1)

    @cached_property
    def _textless(self) -> list[int]:
        # Reading the vocabulary takes long, and validation asks at every batch.
        return textless_tokens(self.tokenizer, getattr(self._task, "own_text", ""))

    @property
    def _sharded(self) -> bool:
        return shards(self.trainer)

    @property
    def _task(self) -> Task:
        task: Task = self.trainer.datamodule  # type: ignore[attr-defined]
        return task

    def _score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
        with agreed():
            scores = scores_of(self._task, responses, prompts)
        return scores.to(self.device)

    @torch.no_grad()
    def _evaluate_rollout(
        self, rollout: Rollout, scores: Tensor, methods: Sequence[Method]
    ) -> tuple[Experience, EntropyStats, dict[str, float]]:
        """Log-probabilities, values and entropies of the policy that sampled; each term's scale."""
        pieces: dict[str, list[Tensor]] = {}
        scales = {term.name: MaskedMean().to(self.device) for term in loss_terms(methods)}
        shown = self._shown_region
        observed = [region for method in methods for region in method.observed_regions]
        head = self._head(methods, shown, *observed)
        # Of the reference, only what is asked for: mostly log-probabilities alone.
        seen = self._head([method for method in methods if method.needs_reference])
        size = self.ppo_args.micro_batch_size
        micros = [rollout[start : start + size] for start in range(0, len(rollout), size)]
        idle = highest(len(micros), self.device) - len(micros) if self._sharded else 0
        for number, micro in enumerate([*micros, *[rollout[:1]] * idle]):
            mask = micro.response_mask
            labels = micro.response_ids[mask]
            outputs, values = self._forward(micro, partial(head.outputs, labels=labels), head)
            reference = self._reference_outputs(micro, labels, seen) if self._reference else None
            if number >= len(micros):
                continue  # other ranks have more rows, and this one has a part of their weights
            stats = torch.stack(list(outputs.entropy(shown)), dim=-1)  # sizes as floats
            piece = {"old_logprobs": outputs.logprobs, "entropies": stats}
            if values is not None:
                piece["values"] = values
            if reference is not None:
                piece["ref_logprobs"] = reference.logprobs
            for method in methods:
                kept = method.observe(outputs, reference)
                if kept is not None:
                    piece[f"observed/{method.name}"] = kept
            for name, part in piece.items():
                spread = part if name == "values" else _spread(part, mask)
                pieces.setdefault(name, []).append(spread)
            for term in loss_terms(methods):
                scales[term.name].update(term.scale(outputs))
        columns = {name: torch.cat(parts) for name, parts in pieces.items()}
        entropies = EntropyStats(*columns["entropies"].unbind(-1))
        self._rollout_metrics.update_entropy(entropies, rollout.response_mask)
        experience = build_experience(
            rollout,
            scores,
            columns["old_logprobs"],
            columns.get("ref_logprobs"),
            columns.get("values"),
            {
                name.removeprefix("observed/"): column
                for name, column in columns.items()
                if name.startswith("observed/")
            },
        )
        factors = {name: float(scale.compute()) for name, scale in scales.items()}
        return experience, entropies, factors

    @property
    def _shown_region(self) -> Region:
        return Region(self.diagnostics_args.top_k, self.diagnostics_args.top_p)

    def entropies(self, rollout: Rollout) -> EntropyStats:
        """What the policy makes of responses, ``[B, T]`` each, 0 at padding; all rows at once."""
        mask, head = rollout.response_mask, self._head([], self._shown_region)
        use = partial(head.outputs, labels=rollout.response_ids[mask])
        outputs, _ = self._forward(rollout, use, head)
        return EntropyStats(*(_spread(part, mask) for part in outputs.entropy(self._shown_region)))

    def _method_values(
        self, methods: Sequence[Method], scales: Mapping[str, float]
    ) -> dict[str, float]:
        """What the methods have to log: coefficients and numbers of their own."""
        values: dict[str, float] = {}
        for method in methods:
            name = f"loss/{method.name}"
            if isinstance(method, LossTerm):
                coef = float(method.coef_at(self.iteration))
                values[f"{name}_coef"] = coef
                values[f"{name}_effective_coef"] = coef * scales[method.name]
            own = method.logged().items()
            values |= {f"{name}_{key}": float(value) for key, value in own}
        return values

    def _head(self, methods: Sequence[Method], *regions: Region) -> Head:
        """How to compute what these methods ask for."""
        named = (region for method in methods for region in method.regions)
        wanted = dict.fromkeys([*regions, *named])
        return Head(
            regions=tuple(wanted),
            temperature=self.rollout_args.temperature,
            memory=self.ppo_args.logits_memory * 2**20,
            fused=self.ppo_args.fused,
            show_logits=any(method.needs_logits for method in methods),
        )

    def _forward(
        self,
        batch: Rollout,
        use: Callable[[HeadInput], T],
        head: Head,
        model: ActorCritic | None = None,
    ) -> tuple[T, Tensor | None]:
        """What ``use`` makes of the counted tokens, and values; by ``model``, or by the trained."""
        ids, mask = sequence_inputs(batch)
        made: tuple[T, Tensor | None] = (model or self.actor_critic)(
            ids, mask, batch.response_mask, use, takes_hidden=head.takes_hidden
        )
        return made

    def _reference_outputs(self, batch: Rollout, labels: Tensor, head: Head) -> PolicyOutputs:
        """The initial policy's view of the counted tokens."""
        reference = self._reference[0]
        if not self._sharded and next(reference.parameters()).device != self.device:
            reference.to(self.device)
        use = partial(head.outputs, labels=labels)
        with without_adapters(reference) if self.policy_args.lora is not None else nullcontext():
            outputs, _ = self._forward(batch, use, head, reference)
        return outputs

    def _update(self, minibatch: TrainingBatch, methods: Sequence[Method], share: float) -> None:
        """One optimiser step on this rank's share of a global minibatch.

        A minibatch whose loss or gradient is not finite is skipped, by all ranks.
        """
        ppo, optim = self.ppo_args, self.optim_args
        rank, ranks = world()
        count = minibatch.response_mask.sum().clamp(min=1)
        local = minibatch[slice(rank, None, ranks)]
        micros = list(local.micro_batches(ppo.micro_batch_size))
        if self._sharded:  # ranks need each other's weights equally often; the first has most rows
            most_rows = math.ceil(len(minibatch) / ranks)
            idle = math.ceil(most_rows / ppo.micro_batch_size) - len(micros)
            micros += [minibatch[:1].uncounted().trimmed()] * idle
        optimizer = self.optimizers(use_pl_optimizer=True)
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        for number, micro in enumerate(micros, start=1):
            with self._gradient_sync(number == len(micros)):
                loss = self._loss(micro, methods, count)
                # Data-parallel strategies average over ranks; the token count is global already.
                self.manual_backward(nan_gradient_if_nonfinite(loss) * ranks)
        groups = self._parameter_groups()
        norms = [
            whole(nn.utils.clip_grad_norm_(params, optim.max_grad_norm)).to(self.device)
            for params, _ in groups
        ]
        if not all_finite(norms):
            optimizer.zero_grad()
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= ppo.max_skipped_updates:
                raise end_of_run(self._update_metrics.parts, norms, self.skipped_in_a_row)
            return self._update_metrics.skip_step()
        self.skipped_in_a_row = 0
        for group, (_, lr) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = lr * share
        optimizer.step()
        self._update_metrics.end_step(*norms)

    def _loss(self, micro: TrainingBatch, methods: Sequence[Method], count: Tensor) -> Tensor:
        """This micro-batch's part of the minibatch's loss; the parts add up to the whole.

        ``count`` is the minibatch's number of counted tokens.
        """
        ppo, mask = self.ppo_args, micro.response_mask
        terms = loss_terms(methods)
        coefs = {term: coef for term in terms if (coef := term.coef_at(self.iteration)) != 0.0}
        head = self._head(list(coefs))
        objective = PolicyObjective.of(micro, ppo, coefs, self.kl_coef)
        use = partial(head.loss, labels=micro.response_ids[mask], losses=objective)
        policy, values = self._forward(micro, use, head)
        total = policy.total
        parts = dict(zip(objective.names, policy.losses.sum(1) / count, strict=True))
        if values is not None and micro.values is not None and micro.returns is not None:
            eps = ppo.value_clip_eps
            errors = value_loss(values, micro.values, micro.returns, value_clip_eps=eps)
            value = ppo.value_coef * masked_sum(errors, mask)
            parts["value"], total = value / count, total + value
        total = total / count
        for name, part in (*parts.items(), ("total", total)):
            self._update_metrics.add_loss(name, part)
        self._update_metrics.update_policy(
            _spread(policy.logprobs, mask), micro, ppo.clip_eps_low, ppo.clip_eps_high
        )
        return total

    def _gradient_sync(self, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients once a step, with the last micro-batch."""
        wrapped = self.trainer.strategy.model
        if last or not isinstance(wrapped, DistributedDataParallel):
            return nullcontext()
        return wrapped.no_sync()

    # ----- held-out prompts

    @float32_or_better()
    def validation_step(
        self, prompts: PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Sample and score responses; the same random numbers at every validation."""
        rollout, texts, scores = self._answer(prompts)
        self._evaluations.of(prompts.split, self.device).update(
            scores,
            rollout.response_mask,
            rollout.finished,
            self._invalid(rollout),
            binary=self._task.binary_scores,
            answers=self._task.answers(texts, prompts),
            standard_errors=self.trainer.testing,
        )
        return {"rollout": rollout, "texts": texts, "scores": scores}

    def on_validation_epoch_end(self) -> None:
        """Log the scores of every set."""
        self.log_dict(self._evaluations.flush())

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    @float32_or_better()
    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record a prompt: prompt, responses and scores (None = could not be scored)."""
        _, texts, scores = self._answer(prompts)
        n = self.evaluation_args.num_responses
        values = [None if math.isnan(score) else score for score in scores.tolist()]
        return [
            {
                "prompt": prompt,
                "responses": texts[i * n : (i + 1) * n],
                "scores": values[i * n : (i + 1) * n],
            }
            for i, prompt in enumerate(prompts.texts)
        ]

    def _answer(self, prompts: PromptBatch) -> tuple[Rollout, list[str], Tensor]:
        rollout = self._sample(prompts, self.evaluation_args)
        texts = self._texts(rollout)
        scores = self._score(texts, prompts)
        self._task.scorer_timeouts()  # not those of the next iteration
        return rollout, texts, scores


def _before_the_end(rollout: Rollout) -> Tensor:
    """Response tokens but for the one that ended the response, ``[B, T]`` bool."""
    mask = rollout.response_mask
    places = torch.arange(mask.shape[1], device=mask.device)
    return mask & (places < (mask.sum(1) - rollout.finished.long()).unsqueeze(1))


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values ``[n, ...]`` of the True entries at their places, ``[B, T, ...]``; 0 elsewhere."""
    spread = values.new_zeros(mask.shape + values.shape[1:])
    spread[mask] = values
    return spread
