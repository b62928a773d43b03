"""The `ppo` stage: iterations with checkpoints, alarms and a look at held-out prompts now and then."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from alignment.chat import ChatFormat
from alignment.data import Loaded
from alignment.decontamination import load_prompts_of
from alignment.dialogue import Prompt
from alignment.distributed import check_split, is_split
from alignment.errors import ConfigError
from alignment.hardware import compute_dtype, process_state
from alignment.isolation import isolated
from alignment.manifests import read_manifest
from alignment.model_folders import check_is_chat_model, load_chat_of
from alignment.models import save_model
from alignment.progress import ProgressBar, console
from alignment.runs import newest_checkpoint, open_run
from alignment.sampling.prompts import Judge, choose_prompts, describe_fitting, prompt_room, prompts_left_out
from rlhf.alarms import Watch
from rlhf.checkpoint import load_checkpoint, save_checkpoint
from rlhf.config import PPOConfig, check_effects
from rlhf.held_out import HeldOut
from rlhf.judges import check_same_ids, judges_context, judges_of, read_judges
from rlhf.policy_sampler import open_policy_vllm
from rlhf.ppo import PPOTrainer, iteration_seed

logger = logging.getLogger(__name__)


@isolated()
def run(config: PPOConfig, *, resume: bool = False) -> dict[str, Any]:
    """Trains the policy; returns the headline figures."""
    if not resume:
        check_effects(config)
    state = process_state(config.run.device)
    accelerator = _accelerator(config)
    data, held_out_data, chat, judges, (_, looks_room) = _read(config)
    run_dir = open_run(config, resume=resume, state=state)
    run_dir.note_sources([*data.sources, *held_out_data.sources])
    dtype = compute_dtype(accelerator.device, config.model.dtype)
    with _trackers(accelerator, config), open_policy_vllm(config, dtype) as vllm:
        trainer = PPOTrainer(config, accelerator, dtype, vllm)
        separate = trainer.models.separate
        run_dir.note(backbone=f"separate: {separate}" if separate else "shared")
        if separate and config.lora.r and config.ppo.share_backbone == "auto" and accelerator.is_main_process:
            console.print(f"ppo: every model has weights of its own, not adapters on one copy: {separate}")
        prompts = trainer.encode(choose_prompts(data, config.prompts, config.run.seed), run_dir)

        policy = trainer.learners["policy"]
        done, watch = 0, Watch(config.alarms)
        options = {"guard": trainer.models.guard, "judges": judges, "room": looks_room, "run_dir": run_dir}
        held_out = HeldOut(config, held_out_data, chat, state, **options)
        if resume and (checkpoint := newest_checkpoint(run_dir)):
            done, extra = load_checkpoint(checkpoint, trainer.learners)
            trainer.beta, watch = extra["beta"], Watch(config.alarms, **extra["watch"])
            held_out.load_state_dict(extra["held_out"])
        if accelerator.is_main_process:
            run_dir.metrics.truncate_after(done or -1)

        def look(*, ends: bool = False) -> dict[str, float]:
            if not held_out.is_due(done, ends=ends):
                return {}
            figures = held_out.look(done, trainer.sampler, trainer.rewards, policy, run_dir)
            return {f"ppo/{name}": value for name, value in figures.items()}

        if done == 0 and (figures := look()):
            run_dir.log(0, figures)
            accelerator.log(figures, step=0)
        total = config.train.max_steps
        with ProgressBar("ppo", total, shown=accelerator.is_main_process, start=done) as bar:
            while done < total and watch.stopped is None and not held_out.has_stopped:
                seed, critic_only = iteration_seed(config.run.seed, done), done < config.ppo.critic_warmup
                metrics = trainer.iterate(trainer.prompts_of(done, prompts), seed=seed, critic_only=critic_only)
                done += 1
                values = {f"ppo/{name}": value for name, value in metrics.items()}
                try:
                    messages = watch.look(done, metrics)
                    values |= look(ends=watch.stopped is not None)
                finally:  # the figures of an iteration that went wrong are worth most
                    run_dir.log(done, values)
                    accelerator.log(values, step=done)
                bar.advance(1, f"reward {metrics['reward']:+.2f}  kl {metrics['kl']:.2f}")
                for message in messages:
                    if accelerator.is_main_process:
                        console.print(f"ppo: iteration {done}: {message}")
                ends = done == total or watch.stopped is not None or held_out.has_stopped
                if ends or done % config.train.save_every == 0:
                    extra = {"beta": trainer.beta, "watch": watch.state(), "held_out": held_out.state_dict()}
                    save_checkpoint(run_dir, done, trainer.learners, extra)
    accelerator.wait_for_everyone()
    is_best = held_out.restore_best(policy)
    model = accelerator.unwrap_model(trainer.policy, keep_fp32_wrapper=False)
    save_model(model, trainer.models.loaded, run_dir.model_dir)
    accelerator.wait_for_everyone()
    # Prompts differ from iteration to iteration, so first and last are means over a quarter of the run each.
    rewards = run_dir.metrics.column("ppo/reward") or [math.nan]  # only the main process is sure to see the file
    quarter = math.ceil(len(rewards) / 4)
    result = run_dir.finish(
        {
            "stage": "ppo",
            "iterations": done,
            "stopped": watch.stopped or ("held_out" if held_out.has_stopped else None),
            "alarms": watch.rung,
            "held_out": held_out.summary(),
            "saved_iteration": held_out.best_iteration if is_best else done,
            "kl": run_dir.metrics.last("ppo/kl_k3"),
            "reward_first": sum(rewards[:quarter]) / quarter,
            "reward_last": sum(rewards[len(rewards) - quarter :]) / quarter,
            "left_out": {
                "prompts": prompts_left_out(run_dir.noted("prompts"), data.sources),
                "evaluation": prompts_left_out(run_dir.noted("evaluation_prompts"), held_out_data.sources),
            },
        }
    )
    run_dir.clear_checkpoints()
    return result


def check(config: PPOConfig, *, untrained: Collection[str] = ()) -> str:
    """What `align ppo --dry-run` says: reads rows and chat formats, loads no weights, writes nothing.

    `untrained` as in `judges_context`.
    """
    if config.run.overwrite or read_manifest(Path(config.run.dir)) is None:
        check_effects(config)
    data, held_out, chat, judges, (room, looks_room) = _read(config, untrained)
    seed = config.run.seed
    prompts, left_out = describe_fitting([chat], data, config.prompts, seed=seed, room=room)
    if not held_out.rows:
        return f"{prompts}, none held out.{left_out}"
    section = config.evaluation.as_prompts(config.prompts)
    options = {"seed": seed, "room": looks_room, "judges": judges, "part": "evaluation"}
    asked, others = describe_fitting([chat], held_out, section, **options)
    return f"{prompts}, {asked} held out.{left_out}{others}"


def _read(
    config: PPOConfig, untrained: Collection[str] = ()
) -> tuple[Loaded[Prompt], Loaded[Prompt], ChatFormat, dict[str, Judge], tuple[int, int]]:
    """The prompts, those held out, the chat format, how reward models and guard read the latter's answers, and the
    tokens of either at most that every model can read, the guard for those held out, too.

    Raises what can be known beforehand.
    """
    data = load_prompts_of(config.prompts)
    held_out = load_prompts_of(config.evaluation.as_prompts(config.prompts))
    sections = judges_of(config.rewards)
    guard = {} if config.evaluation.guard is None else {"evaluation.guard": config.evaluation.guard}
    judges = judges_context(sections, untrained=untrained)
    readers = min(judges, judges_context(guard, untrained=untrained)) if guard else judges
    if guard and not held_out.rows:
        logger.warning("evaluation.guard: has nothing to judge without evaluation.prompts. Name held-out prompts.")
        readers = judges
    check_is_chat_model(config.model.path)
    policy, context = load_chat_of(config.model.path, config.model.chat_template)
    check_same_ids(policy, {name: load_chat_of(m.path, m.chat_template)[0] for name, m in sections.items()})
    room, looks_room = (
        prompt_room(policy, config.sampling, policy_context=context, judge_context=each) for each in (judges, readers)
    )
    of_looks = read_judges({**sections, **guard} if held_out.rows else {}, config.sampling)
    return data, held_out, policy, of_looks, (room, looks_room)


@contextmanager
def _trackers(accelerator: Accelerator, config: PPOConfig) -> Iterator[None]:
    """The trackers of `run.report_to`, finished whatever happens: W&B's run would stay open for the next stage."""
    if config.run.report_to:
        accelerator.init_trackers("align-ppo")
    try:
        yield
    except BaseException:
        for tracker in accelerator.trackers:
            with suppress(Exception):  # the first error is the one to report
                tracker.tracker.finish(exit_code=1) if tracker.name == "wandb" else tracker.finish()
        raise
    for tracker in accelerator.trackers:
        tracker.finish()


def _accelerator(config: PPOConfig) -> Accelerator:
    """The run's processes.

    Raises ConfigError where models would be split over processes in a way that is not supported.
    """
    cpu, trackers = config.run.device == "cpu", config.run.report_to or None
    accelerator = Accelerator(cpu=cpu, log_with=trackers, project_dir=config.run.dir)
    check_split(accelerator)
    if is_split(accelerator) and config.lora.r:
        raise ConfigError(
            "ppo: with LoRA all models stand on one copy of the weights, which FSDP would split for the policy alone. "
            "Launch it with accelerate launch --multi_gpu, or train in full (lora.r=0)."
        )
    return accelerator
