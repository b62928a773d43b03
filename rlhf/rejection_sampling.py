"""Rejection sampling: the best of K candidates becomes a new gold answer (Llama 2 Sec. 3.2.3)."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from accelerate import PartialState

from alignment.chat import ChatFormat
from alignment.data import Loaded, load_rows, write_rows
from alignment.decontamination import load_prompts_of
from alignment.dialogue import Candidate, Messages, Prompt, RowError, as_response
from alignment.errors import ConfigError, DataError
from alignment.files import write_json
from alignment.hardware import process_state
from alignment.headlines import counted
from alignment.isolation import isolated
from alignment.metrics import mean_interval
from alignment.model_folders import check_is_chat_model, load_chat_of
from alignment.runs import Run, open_run
from alignment.sampling.prompts import Asked, Judge, choose_prompts, describe_fitting, prompt_room, prompts_left_out
from reward_models.score import check_fits
from rlhf.candidates import distinct_prompts, remove_candidates, sample_candidates
from rlhf.config import RejectionSamplingConfig
from rlhf.judges import judges_context, judges_of, read_judges, score_candidates, too_long_to_judge
from rlhf.potential import plot_potential, potential_curve
from rlhf.selection import as_dialogue, by_prompt, choose_temperature, select_best


@isolated()
def run(config: RejectionSamplingConfig, *, resume: bool = False) -> dict[str, Any]:
    """Samples, scores, selects; returns the headline figures.

    Writes `candidates.jsonl` (all), `sft.jsonl` (the best, ready for `align sft`), `potential.json` and `.png`.
    """
    state = process_state(config.run.device)
    data, earlier, baseline, chat, judges, room = _read(config)
    run_dir = open_run(config, resume=resume, state=state)
    run_dir.note_sources([*data.sources, *earlier.sources, *baseline.sources])

    chosen = choose_prompts(data, config.prompts, config.run.seed)
    prompts = distinct_prompts(chat, chosen, config.prompts, room=room, run_dir=run_dir, judges=judges)
    fitted = {asked.prompt.messages for asked in prompts}  # some without their oldest turns, as a baseline has them too
    load_rows(config.baseline, _readable(as_response, judges.values(), among=fitted, whole=True))
    tried, too_long = try_temperatures(config, prompts, judges, run_dir, state)
    temperature, by_temperature = choose_temperature(tried) if tried else (config.sampling.temperature, {})
    sampled = sample_candidates(config, {temperature: prompts}, run_dir, state)[temperature]
    too_long |= too_long_to_judge(judges, sampled)
    sampled = [each for each in sampled if each.prompt.messages not in too_long]
    others = [each for t, candidates in tried.items() if t != temperature for each in candidates]
    before = earlier.rows if config.accumulate != "last" else []
    asked = {each.prompt.messages: each.prompt for each in [*before, *sampled, *others]}
    of_asked = [replace(r, prompt=asked[r.prompt.messages]) for r in baseline.rows if r.prompt.messages in asked]
    old = [replace(r, prompt=asked[r.prompt.messages]) for r in before] if config.rescore_earlier else []
    found = iter(score_candidates(config.rewards, [*sampled, *old, *of_asked], state.device, title="reject: scores"))
    scored, rescored = list(islice(found, len(sampled))), list(islice(found, len(old)))
    known = _mean_by_prompt(list(found))
    pool = [*(rescored if config.rescore_earlier else before), *scored, *others]
    selection = select_best(pool, accumulate=config.accumulate, min_gain=config.min_gain, baseline=known)
    if not selection.best:
        reasons = {reason: count for reason, count in selection.left_out.items() if count}
        first = "Lower min_gain" if "below_min_gain" in reasons else "Look at what the model writes (align chat)"
        what_to_do = f"{first}, or draw more (sampling.num_candidates)."
        raise DataError(f"no candidate can be trained on: {counted(reasons)}. {what_to_do}")
    if state.is_main_process:
        write_rows(run_dir.path / "candidates.jsonl", (candidate.to_json() for candidate in [*scored, *others]))
        write_rows(run_dir.path / "sft.jsonl", (as_dialogue(candidate).to_json() for candidate in selection.best))
        _write_potential(temperature, scored, tried, run_dir)
    this_round = select_best(scored, accumulate="last")
    taken = {candidate.prompt.messages for candidate in this_round.best}
    means = _mean_by_prompt([candidate for candidate in scored if candidate.prompt.messages in taken])
    run_dir.note(selection={"kept": len(selection.best), **selection.left_out}, baseline_used=len(known))
    counts = {**run_dir.noted("prompts"), "too_long_with_answer": len(too_long)}
    result = run_dir.finish(
        {
            "stage": "reject",
            "prompts": len(prompts) - len(too_long),
            "pool_prompts": len({candidate.prompt.messages for candidate in pool}),
            "candidates": len(scored) + len(others),
            "kept": len(selection.best),
            "kept_cut_off": sum(candidate.finish_reason == "length" for candidate in selection.best),
            "temperature": temperature,
            "temperatures": by_temperature,
            "mean_reward": mean_interval(list(means.values())).to_json(),
            "mean_best_reward": mean_interval([candidate.reward for candidate in this_round.best]).to_json(),
            "gain_over_median": mean_interval(this_round.gains).to_json(),
            "gain_over_baseline": mean_interval(_gains(this_round.best, known)).to_json(),
            "left_out": {"prompts": prompts_left_out(counts, data.sources)},
        }
    )
    if state.is_main_process:
        remove_candidates(run_dir.path)
    return result


def check(config: RejectionSamplingConfig, *, untrained: Collection[str] = ()) -> str:
    """What `align reject --dry-run` says: reads rows and chat formats, loads no weights, writes nothing.

    `untrained` as in `judges_context`.
    """
    data, earlier, baseline, chat, judges, room = _read(config, untrained)
    options = {"seed": config.run.seed, "room": room, "judges": judges}
    prompts, left_out = describe_fitting([chat], data, config.prompts, **options)
    others = f"{len(earlier.rows)} candidates of earlier rounds, {len(baseline.rows)} baseline responses"
    return f"{prompts}, {others}.{left_out}"


def _read(
    config: RejectionSamplingConfig, untrained: Collection[str] = ()
) -> tuple[Loaded[Prompt], Loaded[Candidate], Loaded[Candidate], ChatFormat, dict[str, Judge], int]:
    """Prompts, candidates of earlier rounds, baseline responses, chat formats, and the tokens of a prompt at most.

    Raises what can be known before anything is sampled.
    """
    check_is_chat_model(config.model.path)
    chat, context = load_chat_of(config.model.path, config.model.chat_template)
    data = load_prompts_of(config.prompts)
    sections = judges_of(config.rewards)
    judges = read_judges(sections, config.sampling)
    scored_anew = _readable(Candidate.from_json, judges.values())
    earlier = load_rows(config.earlier_rounds, scored_anew if config.rescore_earlier else _scored_before)
    latest = max((candidate.round for candidate in earlier.rows), default=-1)
    if latest >= config.round:
        raise ConfigError(
            f"round={config.round}: earlier_rounds has candidates of round {latest}, and rounds are told apart by "
            f"their numbers. Set round={latest + 1}, or name files of earlier rounds only."
        )
    in_pool = {each.messages for each in (*data.rows, *(candidate.prompt for candidate in earlier.rows))}
    baseline = load_rows(config.baseline, _readable(as_response, judges.values(), among=in_pool))
    judge_context = judges_context(sections, untrained=untrained)
    room = prompt_room(chat, config.sampling, policy_context=context, judge_context=judge_context)
    return data, earlier, baseline, chat, judges, room


def _readable(
    parse: Callable[[Mapping[str, Any]], Candidate],
    judges: Collection[Judge],
    *,
    among: Collection[Messages] | None = None,
    whole: bool = False,
) -> Callable[[Mapping[str, Any]], Candidate]:
    """A reader of rows that refuses what a reward model cannot read, where its prompt is `among` some.

    With `whole` also what it can read only without the oldest turns.
    """

    def read(row: Mapping[str, Any]) -> Candidate:
        candidate = parse(row)
        if among is None or candidate.prompt.messages in among:
            for judge in judges:
                if check_fits(judge.chat, judge.context, candidate.prompt.messages, [candidate.response]) and whole:
                    raise RowError(
                        f"the prompt with its response is over the reward model's {judge.context} tokens, and would be "
                        "judged without its oldest turns. Shorten or remove the row."
                    )
        return candidate

    return read


def _scored_before(row: Mapping[str, Any]) -> Candidate:
    """A candidate of an earlier round whose reward is taken as it is. Raises RowError where it has none."""
    candidate = Candidate.from_json(row)
    if candidate.reward is None:
        raise RowError('"reward" is missing. Take rescore_earlier=true, or a file of `align reject`.')
    return candidate


def try_temperatures(
    config: RejectionSamplingConfig,
    prompts: Sequence[Asked],
    judges: Mapping[str, Judge],
    run_dir: Run,
    state: PartialState,
) -> tuple[dict[float, list[Candidate]], set[Messages]]:
    """Scored candidates of some of the prompts at each temperature of the grid; empty where there is no grid.

    Every temperature has the same prompts and the same random numbers. Those that are too long to judge at one of them
    are left out, and returned beside.
    """
    sampling = config.sampling
    if not sampling.temperature_grid:
        return {}, set()
    few = random.Random(config.run.seed).sample(prompts, min(sampling.temperature_prompts, len(prompts)))
    drawn = sample_candidates(config, {temperature: few for temperature in sampling.temperature_grid}, run_dir, state)
    too_long = too_long_to_judge(judges, [each for found in drawn.values() for each in found])
    drawn = {t: [each for each in found if each.prompt.messages not in too_long] for t, found in drawn.items()}
    flat = [each for found in drawn.values() for each in found]
    scored = iter(score_candidates(config.rewards, flat, state.device, title="reject: scores of temperatures"))
    return {t: list(islice(scored, len(found))) for t, found in drawn.items()}, too_long


def _mean_by_prompt(candidates: Sequence[Candidate]) -> dict[Messages, float]:
    return {prompt: statistics.fmean(each.reward for each in found) for prompt, found in by_prompt(candidates).items()}


def _gains(best: Sequence[Candidate], baseline: Mapping[Messages, float]) -> list[float]:
    return [c.reward - baseline[c.prompt.messages] for c in best if c.prompt.messages in baseline]


def _write_potential(
    temperature: float, scored: Sequence[Candidate], tried: Mapping[float, Sequence[Candidate]], run_dir: Run
) -> None:
    """The round's own curve and, where temperatures were tried, one of each over the prompts they were tried on."""
    curve = _curve(scored)
    by_temperature = {f"{t:g}": _curve(found) for t, found in tried.items()}
    write_json(run_dir.path / "potential.json", {"temperature": temperature, **curve, "temperatures": by_temperature})
    shown = by_temperature or {f"{temperature:g}": curve}
    plot_potential({f"temperature {t}": each for t, each in shown.items()}, run_dir.path / "potential.png")


def _curve(candidates: Sequence[Candidate]) -> dict[str, Any]:
    return potential_curve([[each.reward for each in pool] for pool in by_prompt(candidates).values()])
