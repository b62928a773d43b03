"""Selection of candidates: a pure function over candidates.jsonl."""

import json
from dataclasses import replace

import pytest
from judged import candidate, config_of, judged_by

from alignment.chat_formats import chat_format
from alignment.config import PromptSection
from alignment.dialogue import Candidate, Message
from alignment.errors import ConfigError, DataError, ModelError
from alignment.headlines import one_line
from alignment.model_folders import load_chat_of
from alignment.sampling import SamplingParams
from alignment.sampling.prompts import Judge, as_candidate
from alignment.sampling.protocol import Sample
from rlhf import rejection_sampling
from rlhf.config import RejectSampling
from rlhf.selection import as_dialogue, choose_temperature, select_best


def test_the_highest_reward_of_each_prompt_wins_in_order_of_prompts():
    chosen = select_best(
        [candidate("b", 1), candidate("a", 0), candidate("b", 3), candidate("a", -1)], accumulate="best"
    )
    assert [c.reward for c in chosen.best] == [3, 0]
    # Gains over the medians: 3 - median(1, 3) = 1; 0 - median(0, -1) = 0.5.
    assert chosen.gains == [1.0, 0.5]


def test_accumulation_keeps_the_best_of_all_rounds():
    rows = [candidate("a", 5, round_number=1), candidate("a", 2, round_number=2), candidate("old", 1, round_number=1)]
    assert [c.reward for c in select_best(rows, accumulate="best").best] == [5, 1]
    last = select_best(rows, accumulate="last")
    assert [c.reward for c in last.best] == [2]
    assert last.left_out["other_rounds"] == 1


def test_all_keeps_every_rounds_best_and_a_response_once():
    rows = [
        candidate("a", 5, round_number=1), candidate("a", 4, round_number=1), candidate("a", 6, round_number=2),
        candidate("b", 3, round_number=1, text="same"), candidate("b", 3, round_number=2, text="same"),
    ]  # fmt: skip
    chosen = select_best(rows, accumulate="all")
    assert [(c.reward, c.round) for c in chosen.best] == [(5, 1), (6, 2), (3, 1)]
    assert chosen.left_out["repeated"] == 1
    # 5 - median(5, 4); a best alone is its own median.
    assert chosen.gains == [0.5, 0.0, 0.0]


def test_where_all_are_unsafe_the_least_unsafe_is_chosen_and_its_reward_says_so():
    # The gate rewards unsafe responses by their safety score, so the best of them is the safest.
    rows = [candidate("a", -3.0), candidate("a", -1.5), candidate("a", -2.0)]
    assert [c.reward for c in select_best(rows, accumulate="best").best] == [-1.5]


@pytest.mark.parametrize(("rescore", "expected"), [(True, "new"), (False, "old")])
def test_candidates_of_earlier_rounds_are_scored_by_the_newest_reward_models(tmp_path, monkeypatch, rescore, expected):
    """The old answer was given a high reward by another model; the newest gives it a low one."""
    old = replace(candidate("alpha", 50.0, text="old answer", finish="length"), helpfulness=50.0, safety=1.0)
    earlier, prompts = tmp_path / "earlier.jsonl", tmp_path / "prompts.jsonl"
    earlier.write_text(json.dumps(old.to_json()) + "\n")
    prompts.write_text(json.dumps(old.prompt.to_json()) + "\n")

    judged_by(monkeypatch, lambda each: -10.0 if each.round == 1 else float(each.index))
    extra = {"round": 2, "earlier_rounds": [str(earlier)], "rescore_earlier": rescore}
    result = rejection_sampling.run(config_of(tmp_path / "run", prompts, **extra))
    [row] = map(json.loads, (tmp_path / "run" / "sft.jsonl").open())
    assert (row["messages"][-1]["content"] == "old answer") == (expected == "old")
    assert result["kept"] == 1 and result["candidates"] == 3
    curve = json.loads((tmp_path / "run" / "potential.json").read_text())
    assert [entry["value"] for entry in curve["best"]] == pytest.approx([1.0, 5 / 3, 2.0])
    assert sorted(path.name for path in (tmp_path / "run").glob("*.*")) == [
        "candidates.jsonl", "config.yaml", "manifest.json", "potential.json", "potential.png", "result.json",
        "sft.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("accumulate", ["best", "all", "last"])
def test_a_round_is_numbered_above_the_earlier_ones(tmp_path, accumulate):
    """`accumulate=all` keeps the best of every round, and a round is known by its number alone."""
    earlier, prompts = tmp_path / "earlier.jsonl", tmp_path / "prompts.jsonl"
    earlier.write_text("".join(json.dumps(candidate("a", 1, round_number=n).to_json()) + "\n" for n in (1, 3)))
    prompts.write_text(json.dumps(candidate("a", 1).prompt.to_json()) + "\n")
    for number in (1, 3):
        config = config_of(
            tmp_path / "run", prompts, round=number, earlier_rounds=[str(earlier)], accumulate=accumulate
        )
        with pytest.raises(ConfigError, match=rf"round={number}: earlier_rounds has candidates of round 3.*round=4"):
            rejection_sampling.check(config)
    assert not (tmp_path / "run").exists()


def test_an_old_candidate_is_rescored_with_the_flag_that_its_prompt_has_now(tmp_path, monkeypatch):
    """Rewards that are compared come from the same reward model: a prompt is marked in this round, not in the last."""
    old = candidate("alpha", 50.0, text="old answer", finish="length")
    now = replace(old.prompt, is_safety=True)
    earlier, prompts = tmp_path / "earlier.jsonl", tmp_path / "prompts.jsonl"
    earlier.write_text(json.dumps(old.to_json()) + "\n")
    prompts.write_text(json.dumps(now.to_json()) + "\n")
    seen = []
    judged_by(monkeypatch, lambda each: float(seen.append(each.prompt.is_safety) or 0))
    rejection_sampling.run(config_of(tmp_path / "run", prompts, round=2, earlier_rounds=[str(earlier)]))
    assert seen == [True] * 4


def test_a_finished_answer_beats_a_better_scored_one_that_was_cut_off():
    rows = [candidate("a", 9, finish="length"), candidate("a", 1)]
    assert select_best(rows, accumulate="best").best[0].reward == 1
    assert select_best(rows[:1], accumulate="best").best[0].reward == 9


def test_empty_answers_are_never_gold():
    chosen = select_best([candidate("a", 9, text="")], accumulate="best")
    assert chosen.best == [] and chosen.left_out["empty"] == 1


def test_min_gain_leaves_out_prompts_whose_candidates_are_alike():
    rows = [candidate("a", 1.0), candidate("a", 1.1), candidate("b", 0.0), candidate("b", 4.0)]
    chosen = select_best(rows, accumulate="best", min_gain=1.0)
    assert [c.prompt.messages[0].content for c in chosen.best] == ["b"]
    assert chosen.left_out["below_min_gain"] == 1


def test_the_earliest_wins_a_tie():
    first, second = candidate("a", 1, text="first"), candidate("a", 1, text="second")
    assert select_best([first, second], accumulate="best").best == [first]


def test_a_chosen_candidate_becomes_a_dialogue_trained_on_its_answer_only():
    dialogue = as_dialogue(candidate("a", 1, round_number=3))
    assert dialogue.train_on == "last"
    assert dialogue.messages[-1] == Message("assistant", "a 1")
    assert dialogue.source == "rejection_sampling_3"


def test_the_temperature_is_chosen_by_what_selection_would_take_from_it():
    def drawn(*rewards: float, finish: str = "stop") -> list[Candidate]:
        return [candidate("ab"[place // 2], reward, finish=finish) for place, reward in enumerate(rewards)]

    # The bests of prompts a and b: 3 and 1; 2 and 4; at the third 9, but cut off, so that 0 is taken, and 1.
    cut = [candidate("a", 9, finish="length"), candidate("a", 0), *drawn(0, 0, 1, 0)[2:]]
    chosen, table = choose_temperature({1.0: drawn(3, 0, 1, 1), 0.8: drawn(2, 2, 0, 4), 1.2: cut})
    assert chosen == 0.8
    assert {name: row["best"]["value"] for name, row in table.items()} == {"1": 2, "0.8": 3, "1.2": 0.5}
    # Against the chosen: 3 - 2 and 1 - 4.
    assert table["1"]["against_chosen"]["value"] == -1 and table["0.8"]["against_chosen"]["value"] == 0
    assert table["1.2"]["finished"] == 0.75 and table["1"]["finished"] == 1


def test_of_equally_good_temperatures_the_lowest_is_chosen():
    rows = [candidate("a", 1.0)]
    assert choose_temperature({1.2: rows, 0.8: rows, 1.0: rows})[0] == 0.8


def test_a_temperature_twice_in_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"sampling.temperature_grid: \[1.0, 1.0\] has a temperature twice"):
        RejectSampling(temperature_grid=[1, 1.0])


def test_a_baseline_takes_the_place_of_the_median_where_there_is_one():
    rows = [candidate("a", 1.0), candidate("a", 3.0), candidate("b", 0.0), candidate("b", 4.0)]
    known = {rows[0].prompt.messages: 2.5}
    # a: 3 - 2.5; b: 4 - median(0, 4).
    assert select_best(rows, accumulate="best", baseline=known).gains == [0.5, 2.0]
    chosen = select_best(rows, accumulate="best", baseline=known, min_gain=1.0)
    assert [c.prompt.messages[0].content for c in chosen.best] == ["b"]


def test_a_later_round_says_of_how_many_prompts_its_pool_is(tmp_path, monkeypatch):
    prompts, earlier = tmp_path / "prompts.jsonl", tmp_path / "earlier.jsonl"
    prompts.write_text(json.dumps(candidate("alpha", 0.0).prompt.to_json()) + "\n")
    earlier.write_text(json.dumps(replace(candidate("beta", 0.0), helpfulness=0.0, safety=1.0).to_json()) + "\n")

    judged_by(monkeypatch, lambda each: float(each.index))
    result = rejection_sampling.run(config_of(tmp_path / "run", prompts, round=2, earlier_rounds=[str(earlier)]))
    assert (result["prompts"], result["pool_prompts"], result["kept"]) == (1, 2, 2)
    assert one_line(result).startswith("2 answers kept, of 2 prompts of all rounds; reward +1.00")
    assert one_line({**result, "pool_prompts": 1, "kept": 1}).startswith("1 answers kept, of 1 prompts; reward")
    assert result["left_out"] == {"prompts": {}} and "left out" not in one_line(result)


def test_the_line_of_a_run_says_which_prompts_it_left_out(tmp_path, monkeypatch):
    """One row is no prompt, two prompts are too long, and one is so with its first turns only."""
    long = [{"role": "user", "content": "x" * 60}]
    history = [*long, {"role": "assistant", "content": "y"}, {"role": "user", "content": "beta"}]
    rows = [{"prompt": long}, {"prompt": [{"role": "user", "content": "alpha"}]}, {}, {"prompt": history}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))

    judged_by(monkeypatch, lambda each: float(each.index))
    section = PromptSection(prompts=[str(prompts)], max_prompt_length=50, on_error="skip")
    config = config_of(tmp_path / "run", prompts).model_copy(update={"prompts": section})
    result = rejection_sampling.run(config)
    assert result["prompts"] == 2
    assert result["left_out"] == {"prompts": {"unreadable": 1, "too_long": 2, "history_cut": 1}}
    assert one_line(result).endswith("; prompts left out 1 unreadable, 2 too long, cut the history of 1")


def test_gains_over_a_baseline_are_reported_and_required(tmp_path, monkeypatch):
    """The baseline of alpha is scored 1, its candidates 0, 1 and 2; beta has none and a gain of 1 over its median."""
    prompts, baseline = tmp_path / "prompts.jsonl", tmp_path / "baseline.jsonl"
    rows = [candidate(name, 0.0, text="as before") for name in ("alpha", "beta")]
    prompts.write_text("".join(json.dumps(row.prompt.to_json()) + "\n" for row in rows))
    dialogue = {"messages": [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "as before"}]}
    baseline.write_text(json.dumps(dialogue) + "\n")

    judged_by(monkeypatch, lambda each: 1.5 if each.response == "as before" else float(each.index))
    result = rejection_sampling.run(config_of(tmp_path / "run", prompts, baseline=[str(baseline)], min_gain=0.75))
    assert result["gain_over_baseline"]["value"] == 0.5 and result["gain_over_baseline"]["count"] == 1
    assert result["kept"] == 1  # beta: 2 - 1; alpha's 2 - 1.5 is too little
    assert result["mean_reward"]["value"] == 1 and result["mean_reward"]["count"] == 2, "prompts, not candidates"
    [row] = map(json.loads, (tmp_path / "run" / "sft.jsonl").open())
    assert row["messages"][0]["content"] == "beta"


def test_several_baseline_responses_to_a_prompt_count_by_their_mean(tmp_path, monkeypatch):
    """Those to alpha are scored 0 and 1, its candidates 0, 1 and 2; nobody asks gamma."""
    prompts, baseline = tmp_path / "prompts.jsonl", tmp_path / "baseline.jsonl"
    given = [candidate(name, 0.0, text=text) for name, text in (("alpha", "one"), ("alpha", "two"), ("gamma", "one"))]
    prompts.write_text(json.dumps(given[0].prompt.to_json()) + "\n")
    baseline.write_text("".join(json.dumps(each.to_json()) + "\n" for each in given))
    judged_by(monkeypatch, lambda each: {"one": 0.0, "two": 1.0}.get(each.response, float(each.index)))
    result = rejection_sampling.run(config_of(tmp_path / "run", prompts, baseline=[str(baseline)]))
    assert (result["gain_over_baseline"]["value"], result["gain_over_baseline"]["count"]) == (1.5, 1)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["baseline_used"] == 1


def drawing(monkeypatch, *found: Candidate) -> None:
    """Puts these candidates in the place of all that would be sampled."""

    def drawn(config, wanted, *_):
        return {temperature: list(found) for temperature in wanted}

    monkeypatch.setattr(rejection_sampling, "sample_candidates", drawn)


def test_the_mean_reward_and_that_of_the_best_are_of_the_same_prompts(tmp_path, monkeypatch):
    """Of alpha there are answers of reward 0 and 1; nothing is chosen of beta's, which are empty."""
    prompts = tmp_path / "prompts.jsonl"
    found = [candidate("alpha", 0.0), candidate("alpha", 1.0), *[candidate("beta", -5.0, text="")] * 2]
    prompts.write_text("".join(json.dumps(each.prompt.to_json()) + "\n" for each in found[1:3]))
    judged_by(monkeypatch, lambda each: each.reward)
    drawing(monkeypatch, *found)
    result = rejection_sampling.run(config_of(tmp_path / "run", prompts))
    assert (result["prompts"], result["candidates"], result["kept"]) == (2, 4, 1)
    figures = [result[name] for name in ("mean_reward", "mean_best_reward")]
    assert [(each["value"], each["count"]) for each in figures] == [(0.5, 1), (1.0, 1)]


@pytest.mark.parametrize("key", ["baseline", "earlier_rounds"])
def test_a_response_that_no_reward_model_can_read_is_refused_before_anything_is_sampled(tmp_path, monkeypatch, key):
    prompts, given = tmp_path / "prompts.jsonl", tmp_path / "given.jsonl"
    prompts.write_text(json.dumps(candidate("alpha", 0.0).prompt.to_json()) + "\n")
    rows = [candidate(name, 1.0, text=text) for name, text in (("alpha", "as before"), ("alpha", "word " * 5000))]
    given.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    monkeypatch.setattr(rejection_sampling, "sample_candidates", lambda *_: pytest.fail("sampled"))
    with pytest.raises(DataError, match=r"given\.jsonl:2: the prompt's last turn with its response is over"):
        rejection_sampling.run(config_of(tmp_path / "run", prompts, round=2, **{key: [str(given)]}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "problem"), [(40, "would be judged without its oldest turns"), (5000, "last turn")])
def test_a_baseline_of_a_prompt_that_is_cut_is_read_before_anything_is_sampled(tmp_path, monkeypatch, words, problem):
    """The file has the whole prompt, the baseline the cut one. The longer response does not fit at all."""
    prompts, baseline = tmp_path / "prompts.jsonl", tmp_path / "baseline.jsonl"
    texts = ["x " * 60, "b", "y " * 40, "d", "e"]
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    prompts.write_text(json.dumps({"prompt": turns}) + "\n")
    row = {"prompt": turns[2:], "response": [{"role": "assistant", "content": "word " * words}]}
    baseline.write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(rejection_sampling, "sample_candidates", lambda *_: pytest.fail("sampled"))
    config = config_of(tmp_path / "run", prompts, baseline=[str(baseline)])
    section = config.prompts.model_copy(update={"max_prompt_length": 150})
    monkeypatch.setattr(rejection_sampling, "judges_context", lambda judges, **_: 512)
    monkeypatch.setattr(
        rejection_sampling, "read_judges", lambda *_: {"safety": Judge(load_chat_of("toy")[0], 260, 250)}
    )
    with pytest.raises(DataError, match=rf"baseline\.jsonl:1: .*{problem}"):
        rejection_sampling.run(config.model_copy(update={"prompts": section}))


def test_winners_that_were_cut_off_are_counted(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(candidate(name, 0.0).prompt.to_json()) + "\n" for name in ("alpha", "beta")))
    cut = replace(candidate("alpha", 1.0, text="so far"), finish_reason="length")
    drawing(monkeypatch, cut, candidate("beta", 1.0))
    judged_by(monkeypatch, lambda each: 0.0)
    result = rejection_sampling.run(config_of(tmp_path / "run", prompts))
    assert (result["kept"], result["kept_cut_off"]) == (2, 1)


def test_a_baseline_is_judged_as_its_prompts_candidates_are(tmp_path, monkeypatch):
    """A demonstration does not say that its prompt is a safety prompt; one of another prompt is not judged at all."""
    prompts, baseline = tmp_path / "prompts.jsonl", tmp_path / "baseline.jsonl"
    prompts.write_text(json.dumps({**candidate("alpha", 0.0).prompt.to_json(), "is_safety": True}) + "\n")
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "as before"}]}
        for text in ("alpha", "other")
    ]
    baseline.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = []

    def reward(each):
        judged.append((each.prompt.messages[0].content, each.response, each.prompt.is_safety))
        return 0.0

    judged_by(monkeypatch, reward)
    rejection_sampling.run(config_of(tmp_path / "run", prompts, baseline=[str(baseline)]))
    assert [entry for entry in judged if entry[1] == "as before"] == [("alpha", "as before", True)]
    assert {entry[2] for entry in judged} == {True}


def test_an_answer_that_fine_tuning_would_refuse_is_not_chosen(make_tokenizer):
    """In Llama 2's layout a model may write a tag. A cut-off answer is taken before it; one alone is left out."""
    tokenizer = make_tokenizer()
    chat = chat_format(tokenizer, "llama2")
    ids = tokenizer.encode("so [INST] then", add_special_tokens=False)
    tagged = as_candidate(chat, candidate("a", 0).prompt, Sample(ids, [0.0] * len(ids), "stop"), 0, SamplingParams())
    assert (tagged.response, tagged.finish_reason) == ("so [INST] then", "refused")
    tagged = replace(tagged, reward=9.0, round=1)
    cut = candidate("a", 1, finish="length")
    assert select_best([tagged, cut, candidate("a", 0)], accumulate="best").best[0].reward == 0
    assert select_best([tagged, cut], accumulate="best").best == [cut]
    alone = select_best([tagged], accumulate="best")
    assert alone.best == [] and alone.left_out["refused"] == 1


def test_where_nothing_is_selected_the_reasons_are_counted(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(candidate("alpha", 0.0).prompt.to_json()) + "\n")
    judged_by(monkeypatch, lambda each: 0.0)
    problem = r"no candidate can be trained on: 1 below min gain\. Lower min_gain, or draw more \(sampling\.num_cand"
    with pytest.raises(DataError, match=problem):
        rejection_sampling.run(config_of(tmp_path / "run", prompts, min_gain=1.0))


def test_where_all_answers_are_empty_no_setting_is_blamed_that_is_off(tmp_path, monkeypatch):
    prompts, empty = tmp_path / "prompts.jsonl", candidate("alpha", 0.0, text="")
    prompts.write_text(json.dumps(empty.prompt.to_json()) + "\n")
    judged_by(monkeypatch, lambda each: 0.0)
    drawing(monkeypatch, empty, empty)
    with pytest.raises(DataError, match=r"trained on: 1 empty\. Look at what the model writes \(align chat\), or draw"):
        rejection_sampling.run(config_of(tmp_path / "run", prompts))


def test_a_first_round_may_have_the_number_0(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(candidate("alpha", 0.0).prompt.to_json()) + "\n")
    judged_by(monkeypatch, lambda each: 0.0)
    assert rejection_sampling.check(config_of(tmp_path / "run", prompts, round=0)).startswith("1 prompts, 0 candidates")


def test_what_would_fail_after_sampling_fails_before(tmp_path):
    """A chat model for a reward model, and candidates without a reward that are not to be scored again."""
    prompts, earlier = tmp_path / "prompts.jsonl", tmp_path / "earlier.jsonl"
    prompts.write_text(json.dumps(candidate("alpha", 0.0).prompt.to_json()) + "\n")
    with pytest.raises(ModelError, match=r"rewards.helpfulness: toy: not a reward model"):
        rejection_sampling.run(config_of(tmp_path / "run", prompts))
    earlier.write_text(json.dumps(replace(candidate("alpha", 0.0), reward=None).to_json()) + "\n")
    extra = {"earlier_rounds": [str(earlier)], "rescore_earlier": False, "round": 2}
    with pytest.raises(DataError, match=r'earlier.jsonl:1: "reward" is missing'):
        rejection_sampling.run(config_of(tmp_path / "run", prompts, **extra))
    assert not (tmp_path / "run").exists()
