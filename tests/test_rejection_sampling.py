"""Selection of candidates: a pure function over candidates.jsonl."""

from alignment.dialogue import Candidate, Message, Prompt
from rlhf.rejection_sampling import as_dialogue, select_best


def candidate(prompt: str, reward: float, *, round_number: int = 1, text: str | None = None, finish: str = "stop"):
    return Candidate(
        prompt=Prompt(messages=(Message("user", prompt),)),
        response=f"{prompt} {reward}" if text is None else text,
        index=0,
        reward=reward,
        round=round_number,
        finish_reason=finish,
    )


def test_the_highest_reward_of_each_prompt_wins_in_order_of_prompts():
    chosen = select_best(
        [candidate("b", 1), candidate("a", 0), candidate("b", 3), candidate("a", -1)], accumulate="all"
    )
    assert [c.reward for c in chosen.best] == [3, 0]
    # Gains over the medians: 3 - median(1, 3) = 1; 0 - median(0, -1) = 0.5.
    assert chosen.gains == [1.0, 0.5]


def test_accumulation_keeps_the_best_of_all_rounds():
    rows = [candidate("a", 5, round_number=1), candidate("a", 2, round_number=2), candidate("old", 1, round_number=1)]
    assert [c.reward for c in select_best(rows, accumulate="all").best] == [5, 1]
    last = select_best(rows, accumulate="last")
    assert [c.reward for c in last.best] == [2]
    assert last.left_out["other_rounds"] == 1


def test_a_finished_answer_beats_a_better_scored_one_that_was_cut_off():
    rows = [candidate("a", 9, finish="length"), candidate("a", 1)]
    assert select_best(rows, accumulate="all").best[0].reward == 1
    assert select_best(rows[:1], accumulate="all").best[0].reward == 9


def test_empty_answers_are_never_gold():
    chosen = select_best([candidate("a", 9, text="")], accumulate="all")
    assert chosen.best == [] and chosen.left_out["empty"] == 1


def test_min_gain_leaves_out_prompts_whose_candidates_are_alike():
    rows = [candidate("a", 1.0), candidate("a", 1.1), candidate("b", 0.0), candidate("b", 4.0)]
    chosen = select_best(rows, accumulate="all", min_gain=1.0)
    assert [c.prompt.messages[0].content for c in chosen.best] == ["b"]
    assert chosen.left_out["below_min_gain"] == 1


def test_the_earliest_wins_a_tie():
    first, second = candidate("a", 1, text="first"), candidate("a", 1, text="second")
    assert select_best([first, second], accumulate="all").best == [first]


def test_a_chosen_candidate_becomes_a_dialogue_trained_on_its_answer_only():
    dialogue = as_dialogue(candidate("a", 1, round_number=3))
    assert dialogue.train_on == "last"
    assert dialogue.messages[-1] == Message("assistant", "a 1")
    assert dialogue.source == "rejection_sampling_3"
