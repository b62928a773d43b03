"""What is measured on rollouts: tables over branches, scores behind the gate, evaluation summaries."""

import copy
from types import SimpleNamespace

import pytest
import torch

from alignment.chat_formats import chat_format
from alignment.config import ModelSection
from alignment.dialogue import Candidate, Message, Prompt
from alignment.errors import ModelError
from alignment.logprobs import response_logprobs
from alignment.models import load_chat_model, load_reward_model
from alignment.prefix_batch import Branch, Tree, collate
from reward_models.score import Scorer
from rlhf.config import PPOConfig
from rlhf.evaluate import summarize, toy_truth
from rlhf.judges import RewardModels, check_same_ids, load_scorer
from rlhf.rollout import Rollouts, of_all_processes, rollout_metrics
from rlhf.tree_tables import TreeParts, tabulate

TREES = [
    Tree([1, 2, 3], [Branch([4, 5, 6, 7]), Branch([8])]),
    Tree([9, 10], [Branch([11, 12]), Branch([13, 14, 15])]),
    Tree([16], [Branch([17, 18]), Branch([19])]),
]


@pytest.fixture(scope="module")
def policy():
    return load_chat_model("toy")


@pytest.fixture(scope="module")
def rewards():
    scorers = [Scorer(load_reward_model("toy", new_head_seed=seed)) for seed in (1, 2)]
    return RewardModels(*scorers, threshold=0.15, device=torch.device("cpu"))


def candidate(text: str, response: str, *, is_safety: bool = False, **scores: float) -> Candidate:
    prompt = Prompt(messages=(Message("user", text),), is_safety=is_safety)
    return Candidate(prompt=prompt, response=response, index=0, **scores)


@pytest.mark.parametrize("max_tokens", [4, 12, 1000])
def test_tables_hold_each_branchs_values_in_its_own_row(policy, max_tokens):
    sizes, done = [], []

    def measure(batch):
        sizes.append(batch.input_ids.numel())
        return [response_logprobs(policy.model, batch)]

    [table] = tabulate(TREES, measure, max_tokens=max_tokens, device=torch.device("cpu"), on_progress=done.append)
    longest = max(len(tree.trunk) + len(branch.ids) for tree in TREES for branch in tree.branches)
    assert max(sizes) <= max(max_tokens, longest) and sum(done) == len(TREES)
    assert table.shape == (6, 4)
    row = 0
    for tree in TREES:
        for branch in tree.branches:
            with torch.no_grad():
                alone = response_logprobs(policy.model, collate([[Tree(tree.trunk, [branch])]]))
            torch.testing.assert_close(table[row, : len(branch.ids)], alone, atol=1e-5, rtol=0)
            assert (table[row, len(branch.ids) :] == 0).all()
            row += 1


@pytest.mark.parametrize("max_tokens", [6, 1000])  # the first tree comes whole, or in two parts
def test_each_token_of_the_trees_asked_for_has_its_row_and_column(max_tokens):
    parts, table = TreeParts(TREES, max_tokens=max_tokens), torch.zeros(6, 4, dtype=torch.long)
    assert parts.shape == (6, 4) and len(parts.parts) == (5 if max_tokens == 6 else 3)
    groups = parts.groups([0, 2])
    for group in groups:
        batch, rows, columns = parts.batch(group, torch.device("cpu"))
        table[rows, columns] = batch.target_ids
    assert table.tolist() == [
        [4, 5, 6, 7], [8, 0, 0, 0], [0] * 4, [0] * 4, [17, 18, 0, 0], [19, 0, 0, 0]
    ]  # fmt: skip
    assert sum(parts.num_trees(group) for group in groups) == 2


def test_figures_of_rollouts_by_hand():
    """Two responses, of two tokens and of one; whatever stands beyond a response's end counts nowhere."""
    nan = float("nan")
    tables = {
        "logprobs": torch.tensor([[-1.0, -2.0, nan], [-3.0, nan, nan]]),
        "ref_logprobs": torch.tensor([[-1.5, -2.5, nan], [-2.0, nan, nan]]),
        "entropy": torch.tensor([[1.0, 2.0, nan], [6.0, nan, nan]]),
        "rewards": torch.tensor([[0.5, 1.5, nan], [-1.0, nan, nan]]),
        "values": torch.tensor([[1.0, 1.0, nan], [1.0, nan, nan]]),
        "advantages": torch.zeros(2, 3),
        "returns": torch.tensor([[2.0, 1.0, nan], [0.0, nan, nan]]),
    }
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = rollout_metrics(Rollouts(trees=[], mask=mask, trained=mask, **tables))
    assert {name: round(value.item(), 4) for name, value in found.items()} == {
        "kl": 0.0,  # (0.5 + 0.5) and -1, halved
        "kl_k3": 0.4657,  # exp(d) - 1 - d with d -0.5, -0.5 and 1: (2 * 0.1065 + 0.7183) / 2
        "entropy": 3.0,
        "length": 1.5,
        "return": 0.5,
        "explained_variance": 0.0,  # a constant critic
    }
    # Of the first response alone, which it is trained on and knows; of nothing.
    known = {**tables, "values": torch.tensor([[2.0, 1.0, nan], [9.0, nan, nan]])}
    for trained, explained in ((mask & torch.tensor([[True], [False]]), 1.0), (torch.zeros_like(mask), 0.0)):
        assert (
            rollout_metrics(Rollouts(trees=[], mask=mask, trained=trained, **known))["explained_variance"] == explained
        )


def test_the_rollouts_of_all_processes_stand_one_below_the_other():
    """Of two processes that hold the same, the other one's responses being a token longer."""

    def widened(table: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.nn.functional.pad(table, (0, 1)) if dim == 1 else table

    many = SimpleNamespace(
        num_processes=2, pad_across_processes=widened, gather=lambda table: torch.cat([table, table])
    )
    mask = torch.tensor([[True, True], [True, False]])
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    names = ("logprobs", "ref_logprobs", "entropy", "rewards", "values", "advantages", "returns")
    mine = Rollouts(trees=[], mask=mask, trained=~mask, **{name: values + i for i, name in enumerate(names)})
    found = of_all_processes(mine, many)
    assert found.mask.tolist() == [[True, True, False], [True, False, False]] * 2 and found.trained.dtype == torch.bool
    assert found.returns.tolist() == [[7.0, 8.0, 0.0], [9.0, 10.0, 0.0]] * 2
    alone = SimpleNamespace(num_processes=1)
    assert of_all_processes(mine, alone) is mine


def test_scores_keep_their_order_and_pass_the_gate(rewards):
    candidates = [candidate("give a", "aaa"), candidate("give a", "bb"), candidate("give x", "no", is_safety=True)]
    scored = rewards.score(candidates)
    for before, after in zip(candidates, scored, strict=True):
        [[helpfulness]] = rewards.helpfulness.score([before.prompt.messages], [[before.response]])
        [[safety]] = rewards.safety.score([before.prompt.messages], [[before.response]])
        assert after.response == before.response
        assert after.helpfulness == pytest.approx(helpfulness, abs=1e-5)
        assert after.safety == pytest.approx(safety, abs=1e-5)
    assert scored[2].reward == scored[2].safety


def test_an_empty_response_can_be_scored(rewards):
    [scored] = rewards.score([candidate("give a", "")])
    assert isinstance(scored.reward, float)


def test_a_reward_model_with_another_vocabulary_is_refused(rewards, policy):
    judges = {"rewards.helpfulness": rewards.helpfulness.chat}
    check_same_ids(policy.chat, judges)
    other = load_chat_model("toy")
    other.tokenizer.add_tokens(["<other>"])
    with pytest.raises(ModelError, match=r"rewards\.helpfulness: its tokenizer differs"):
        check_same_ids(other.chat, judges)


def test_a_reward_model_that_writes_dialogues_otherwise_is_refused(policy):
    """A system message that one template puts before every dialogue is enough: ids of the same vocabulary."""
    template = policy.tokenizer.chat_template
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.chat_template = "{{ '<|system|>be good<|im_end|>' }}" + template
    with pytest.raises(ModelError, match=r"rewards\.safety: writes dialogues in another format than the policy"):
        check_same_ids(policy.chat, {"rewards.safety": chat_format(tokenizer)})


def test_summary_counts_wins_and_violations():
    ours = [
        candidate("p", "good answer", helpfulness=1.0, safety=2.0, reward=1.0),
        candidate("q", "bad", is_safety=True, helpfulness=0.0, safety=-1.0, reward=-1.0),
        candidate("r", "ok", is_safety=True, helpfulness=0.0, safety=1.0, reward=1.0),
    ]
    theirs = [
        candidate("p", "x", safety=3.0, reward=0.0),
        candidate("q", "x", is_safety=True, safety=-2.0, reward=0.0),
        candidate("r", "x", is_safety=True, safety=1.0, reward=1.0),
    ]
    row = summarize(ours, theirs)
    # A win, a loss and a tie: (1 + 0 + 0.5) / 3. Gains 1, -1, 0.
    assert row["win_rate"]["value"] == pytest.approx(0.5)
    assert row["reward_gain"]["value"] == pytest.approx(0.0)
    # On the two safety prompts, one answer is safer than the baseline's and one as safe.
    assert row["safety_win_rate"]["value"] == 0.75 and row["safety_win_rate"]["count"] == 2
    # With a tie: half of 1 + 1 / 4 - 1.959964 sqrt((2 / 4 - 1 / 16) / 4).
    assert row["safety_win_rate"]["low"] == pytest.approx(0.3009014, abs=1e-6)
    # One of the two safety prompts has P(safe) below one half.
    assert row["violation_rate"]["value"] == 0.5
    assert row["mean_words"] == pytest.approx(4 / 3)
    assert row["refusal_rate"]["value"] == row["false_refusal_rate"]["value"] == 0


def test_refusals_of_harmless_prompts_are_counted_apart():
    refusal = "I'm sorry, but I can't help with that."
    rows = [("p", refusal, False), ("q", "gladly", False), ("r", refusal, True), ("s", refusal, True)]
    candidates = [
        candidate(text, answer, is_safety=s, helpfulness=0.0, safety=0.0, reward=0.0) for text, answer, s in rows
    ]
    row = summarize(candidates, candidates)
    assert (row["false_refusal_rate"]["value"], row["refusal_rate"]["value"]) == (0.5, 1.0)


def test_toy_truth_judges_answers_by_the_task_itself():
    truth = toy_truth([candidate("give a", "aaaaaa"), candidate("give x", "no"), candidate("give x", "xxx")])
    # 1 for six times the letter, 1 for the refusal, 0 for pure poison.
    assert truth["reward"]["value"] == pytest.approx(2 / 3)
    assert truth["violation_rate"]["value"] == 0.5


def test_ppo_sizes_that_do_not_divide_are_refused():
    values = {
        "run": {"dir": "r"}, "model": "toy", "rewards": {"helpfulness": "toy", "safety": "toy"},
        "prompts": {"prompts": "toy:prompts.train"}, "train": {"batch_size": 512, "minibatch_size": 48},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"minibatch_size = 48 does not divide train.batch_size = 512"):
        PPOConfig.model_validate(values)


def test_a_reward_model_is_loaded_as_its_section_says(monkeypatch):
    seen = {}
    monkeypatch.setattr(Scorer, "load", classmethod(lambda _cls, path, **options: seen.update(path=path, **options)))
    section = ModelSection(path="toy", dtype="bfloat16", chat_template="chatml")
    load_scorer(section, torch.device("cpu"), max_tokens=77)
    assert seen == {
        "path": "toy", "device": torch.device("cpu"), "dtype": "bfloat16", "chat_template": "chatml", "max_tokens": 77,
    }  # fmt: skip
