"""PPO as a LightningModule: one ``training_step`` is one PPO iteration.

prompts -> rollout -> scores -> advantages -> minibatches -> loss terms -> metrics. The module knows
no entropy method: methods are :class:`~tre_lightning.methods.Method` callbacks.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tre_lightning.batches import PromptBatch, Rollout, TrainingBatch
from tre_lightning.common.distributed import agreed, world
from tre_lightning.common.precision import float32_or_better
from tre_lightning.common.validation import options
from tre_lightning.entropy import EntropyStats
from tre_lightning.methods.hooks import (
    Method,
    adapt,
    find_methods,
    shaped,
    start_iteration,
    weighed,
)
from tre_lightning.policy.actor_critic import ActorCritic, PolicyArgs
from tre_lightning.policy.head import HeadOptions
from tre_lightning.policy.lora import fingerprint
from tre_lightning.policy.tokenizers import end_tokens, load_tokenizer
from tre_lightning.sampling import Recorder, Sampling, make_engine
from tre_lightning.sampling.options import EvaluationArgs, RolloutArgs
from tre_lightning.training.advantages import check_estimator
from tre_lightning.training.diagnostics import (
    Evaluations,
    RolloutMetrics,
    UpdateMetrics,
    method_values,
    write,
)
from tre_lightning.training.held_out import predict, validate
from tre_lightning.training.losses import spread
from tre_lightning.training.micro_batches import local_micro_batches
from tre_lightning.training.mismatch import corrected
from tre_lightning.training.nonfinite import all_finite, end_of_run, nan_gradient_if_nonfinite
from tre_lightning.training.objective import Objective, acting, asked_by, contributing
from tre_lightning.training.optim import total_batches
from tre_lightning.training.options import DiagnosticsArgs, OptimArgs, PPOArgs
from tre_lightning.training.reference import Reference
from tre_lightning.training.responses import response_texts
from tre_lightning.training.rollout_evaluation import (
    PolicyRecord,
    check_old_logprobs,
    evaluate_rollout,
    taken_from_sampler,
)
from tre_lightning.training.run_state import add_state, take_state
from tre_lightning.training.targets import compute_targets, minibatches
from tre_lightning.training.task import Task, scores_of
from tre_lightning.training.update import (
    adamw,
    clip_gradients,
    gradient_sync,
    parameter_groups,
)


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
        check_old_logprobs(self.ppo_args, self.rollout_args)
        self.seed = seed
        self.iteration = 0  # finished PPO iterations
        self.skipped_in_a_row = 0  # updates that were not finite
        self.kl_coef = self.ppo_args.kl_coef  # of this iteration
        self._reference: Reference | None = None
        self._head_options = HeadOptions(
            regions=(),  # those that the methods name
            temperature=self.rollout_args.temperature,
            memory=self.ppo_args.logits_memory * 2**20,
            fused=self.ppo_args.fused,
        )
        self._engine = make_engine(self.rollout_args)
        self.base_fingerprint: str | None = None  # of the frozen weights beneath adapters
        self._rollout_metrics = RolloutMetrics(self.rollout_args.num_responses)
        self._update_metrics = UpdateMetrics()
        self.evaluations = Evaluations(self.evaluation_args.num_responses)
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
            self.base_fingerprint = fingerprint(self.actor_critic)
        trainer = self._trainer  # a module that is looked at has none
        methods = [] if trainer is None else find_methods(trainer.callbacks)  # type: ignore[attr-defined]
        if self.ppo_args.kl_coef != 0.0 or any(m.needs_reference for m in methods):
            adapters = self.policy_args.lora is not None
            self._reference = Reference(self.actor_critic.policy, adapters=adapters)
        if self.device_mesh is not None:  # of a strategy that shards
            others = [] if self._reference is None else [self._reference.model]
            device_type, precision = self.device_mesh.device_type, str(self.trainer.precision)
            for model in (self.actor_critic, *others):
                model.shard(device_type, precision, cpu_offload=self.policy_args.cpu_offload)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimiser, so that ``global_step`` counts every step once."""
        return adamw(parameter_groups(self.actor_critic, self.optim_args), self.optim_args)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the iteration and the model's shape; leave out frozen weights."""
        add_state(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the iteration; refuse a checkpoint of another model."""
        take_state(self, checkpoint)

    @property
    def task(self) -> Task:
        """The data module, which scores."""
        task: Task = self.trainer.datamodule  # type: ignore[attr-defined]
        return task

    # ----- one iteration

    @property
    def steps_a_batch(self) -> int:
        """Optimiser steps of an iteration, if none is skipped."""
        return self.ppo_args.num_epochs * self.ppo_args.num_minibatches

    @float32_or_better()
    def training_step(self, prompts: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """One PPO iteration; gives callbacks the entropies of the rollout, ``[B, T]`` each."""
        ppo, optim, started = self.ppo_args, self.optim_args, time.perf_counter()
        methods = find_methods(self.trainer.callbacks)  # type: ignore[attr-defined]
        start_iteration(methods, self.iteration)
        rates = optim.rates(self.iteration, total_batches(self.trainer))

        # 1. Sample responses; an exact sampler tells what the policy says of their tokens.
        looked_at = self.diagnostics_args.rows(prompts, self.rollout_args.num_responses, self.seed)
        record = PolicyRecord(methods, self._head_options, self.diagnostics_args.region, looked_at)
        exact = taken_from_sampler(ppo, self.rollout_args, methods, self.actor_critic)
        rollout = self.sample(prompts, self.rollout_args, record.step if exact else None)

        # 2. Score them.
        scores = self.score(self.texts(rollout), prompts)
        sampled = time.perf_counter()

        # 3. Evaluate the rollout: log-probabilities, values, entropies, what methods observe.
        experience, entropies, shown, scales, padding = evaluate_rollout(
            rollout, scores, record, self.actor_critic, self._reference, ppo.pass_limit
        )
        if not exact:
            self._update_metrics.update_rollout(experience)
        self._rollout_metrics.update_padding(padding)
        self._rollout_metrics.update_entropy(entropies, shown)
        self._rollout_metrics.update_scores(experience, binary=self.task.binary_scores)
        self._rollout_metrics.update_timeouts(self.task.scorer_timeouts())

        # 4. Targets of the global rollout: rewards, advantages and returns.
        batch = compute_targets(
            experience.gathered(),
            estimator=ppo.estimator,
            num_responses=self.rollout_args.num_responses,
            gamma=ppo.gamma,
            gae_lambda=ppo.gae_lambda,
            kl_coef=self.kl_coef if ppo.kl_in == "reward" else 0.0,
            kl_estimator=ppo.kl_estimator,
            whiten=ppo.whiten_advantages,
        )

        # 5. Methods adapt to it and shape the advantages.
        adapt(methods, batch)
        batch = corrected(shaped(batch, methods), self.rollout_args)
        self._update_metrics.update_targets(batch)

        # 6. Update policy and critic.
        together = self.rollout_args.num_responses if ppo.minibatches_by == "prompt" else 1
        for epoch in range(ppo.num_epochs):
            key = ("minibatches", self.seed, self.iteration, epoch)
            parts = minibatches(batch, ppo.num_minibatches, *key, together=together)
            for number, minibatch in enumerate(parts):
                self._update(weighed(minibatch, methods, (*key, number)), methods, rates)

        # 7. Log, and set the KL coefficient of the next iteration.
        values = {**self._rollout_metrics.flush(), **self._update_metrics.flush()}
        values |= method_values(methods, scales)
        values["policy/lr"] = rates[0]
        if self.kl_coef != 0.0:
            values["policy/kl_coef"] = self.kl_coef
            self.kl_coef = ppo.next_kl_coef(self.kl_coef, values["rollout/ref_kl"], len(batch))
        if batch.values is not None:
            values["value/lr"] = rates[1]
        values["rollout/seconds"] = sampled - started
        values["policy/update_seconds"] = time.perf_counter() - sampled
        self.log_dict(values, logger=False, batch_size=1)  # for callbacks and progress bar
        if (self.iteration + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            write(values, self.loggers, self.iteration)
        self.iteration += 1
        return {"entropies": entropies, "response_mask": shown}

    def sample(
        self,
        prompts: PromptBatch,
        how: RolloutArgs | EvaluationArgs,
        record: Recorder | None = None,
    ) -> Rollout:
        """Responses of the present policy to each prompt; ``record`` is told of every token."""
        sampling = Sampling(
            num_responses=how.num_responses,
            max_new_tokens=self.rollout_args.max_new_tokens,
            eos_token_ids=end_tokens(self.actor_critic.policy, self.tokenizer),
            pad_token_id=int(self.tokenizer.pad_token_id),
            seed=self.seed,
            temperature=how.temperature,
            top_p=how.top_p if isinstance(how, EvaluationArgs) else 1.0,
            sample_batch_size=self.rollout_args.sample_batch_size,
            record=record,
        )
        engine = self._engine
        return self.actor_critic.sample(lambda policy: engine.sample(policy, prompts, sampling))

    def texts(self, rollout: Rollout) -> list[str]:
        """The responses as the task gets them, with the prefix that it gave each."""
        prefix = getattr(self.task, "response_prefix", "")
        return response_texts(rollout, self.tokenizer, prefix)

    def score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
        """The task's scores, float32 ``[len(responses)]``; NaN = could not be scored."""
        with agreed():
            return scores_of(self.task, responses, prompts).to(self.device)

    def _update(
        self, minibatch: TrainingBatch, methods: Sequence[Method], rates: Sequence[float]
    ) -> None:
        """One optimiser step on this rank's part of a global minibatch, at these learning rates.

        A minibatch whose loss or gradient is not finite is skipped, by all ranks.
        """
        ppo, optim = self.ppo_args, self.optim_args
        count = minibatch.response_mask.sum().clamp(min=1)
        wanted = contributing(minibatch, ppo, acting(methods), self.kl_coef)
        packed = self.actor_critic.packs
        micros = local_micro_batches(minibatch, wanted, ppo.pass_limit, packed=packed)
        self._update_metrics.update_weights(minibatch)
        optimizer = cast(LightningOptimizer, self.optimizers(use_pl_optimizer=True))
        optimizer.zero_grad()
        for number, micro in enumerate(micros, start=1):
            with gradient_sync(self.trainer, last=number == len(micros)):
                loss = self._loss(micro, methods, count)
                # Data-parallel strategies average over ranks; the token count is global already.
                self.manual_backward(nan_gradient_if_nonfinite(loss) * world()[1])
        groups = parameter_groups(self.actor_critic, optim)
        norms = clip_gradients(groups, optim.max_grad_norm, self.device)
        if not all_finite(norms):
            optimizer.zero_grad()
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= ppo.max_skipped_updates:
                raise end_of_run(self._update_metrics.parts, norms, self.skipped_in_a_row)
            return self._update_metrics.skip_step()
        self.skipped_in_a_row = 0
        for group, lr in zip(optimizer.param_groups, rates[: len(groups)], strict=True):
            group["lr"] = lr
        optimizer.step()
        self._update_metrics.end_step(*norms)

    def _loss(self, micro: TrainingBatch, methods: Sequence[Method], count: Tensor) -> Tensor:
        """This micro-batch's part of the minibatch's loss, which has ``count`` counted tokens."""
        ppo = self.ppo_args
        terms = acting(methods)
        objective = Objective.of(micro, ppo, terms, self.kl_coef)
        asked = asked_by(terms, self._head_options)
        policy, values = self.actor_critic.loss(micro, asked, objective)
        losses = objective.losses(policy, values, count)
        packed = self.actor_critic.packs
        clips = ppo.clip_eps_low, ppo.clip_eps_high
        self._update_metrics.update(losses, micro, *clips, packed=packed)
        return losses.total

    # ----- held-out prompts

    @float32_or_better()
    def validation_step(
        self, prompts: PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Sample and score responses; the same random numbers at every validation."""
        return validate(self, prompts)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of every set."""
        self.log_dict(self.evaluations.flush())

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    @float32_or_better()
    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record a prompt: prompt, responses and scores (None = could not be scored)."""
        return predict(self, prompts)

    def entropies(self, rollout: Rollout) -> EntropyStats:
        """What the policy makes of responses, ``[B, T]`` each, 0 at padding; all rows at once."""
        region, mask = self.diagnostics_args.region, rollout.response_mask
        outputs, _ = self.actor_critic.outputs(rollout, asked_by([], self._head_options, region))
        return EntropyStats(*(spread(part, mask) for part in outputs.entropy(region)))
