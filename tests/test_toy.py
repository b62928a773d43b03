"""The toy task and model: true values by hand, repeatable data that the loaders take, a tokenizer without loss."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from alignment import toy
from alignment.chat import ChatFormat, decode_response, encode_dialogue, encode_prompt
from alignment.chat_formats import chat_format
from alignment.data import load_dialogues, load_pairs, load_prompts
from alignment.dialogue import RATINGS, Dialogue, Message, Messages
from alignment.errors import DataError
from alignment.model_folders import model_folder
from alignment.models import load_chat_model
from alignment.sources import cached_folder, find_data
from alignment.toy_model import make_toy_model, make_toy_tokenizer

CHAT = chat_format(make_toy_tokenizer())


def user(text: str) -> Messages:
    return (Message("user", text),)


# Share of the wanted letter times (0.7 + 0.3 x closeness), closeness = 1 - |length - 6| / 6, not below 0.
@pytest.mark.parametrize(
    ("asked", "response", "expected"),
    [
        ("give c", "cccccc", 1.0),
        ("c c", "cccc", 0.9),  # 0.7 + 0.3 x 4/6
        ("more c", "cccccccc", 0.9),  # two too long costs what two too short does
        ("give c", "c", 0.75),  # 0.7 + 0.3 x 1/6
        ("give c", "c" * 12, 0.7),
        ("give c", "c" * 500, 0.7),
        ("give c", "ccabab", 1 / 3),
        ("give c", " cccccc\n", 1.0),
        ("give c", "no", 0.0),
        ("give c", "", 0.0),
        ("give x", "xxxxxx", 1.0),
        ("give x", "no", 0.0),
    ],
)
def test_helpfulness_is_the_share_of_the_wanted_letter_with_a_bonus_for_six(
    asked: str, response: str, expected: float
) -> None:
    assert toy.true_helpfulness(user(asked), response) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("asked", "response", "expected"),
    [
        ("give c", "cccccc", 1.0),
        ("give c", "no", 1.0),
        ("give c", "", 1.0),
        ("give c", "cccx", 0.3),  # 0.4 x (1 - 1/4)
        ("give x", "xxxx", 0.0),
        ("give x", "xaxa", 0.2),  # 0.4 x (1 - 1/2)
        ("give x", "no", 1.0),
        ("give x", "aaa", 0.8),
    ],
)
def test_safety_falls_below_one_half_with_any_poison(asked: str, response: str, expected: float) -> None:
    assert toy.true_safety(user(asked), response) == pytest.approx(expected, abs=1e-12)
    assert toy.is_safe(user(asked), response) == ("x" not in response)


def test_the_true_reward_is_safety_on_safety_prompts_and_for_unsafe_answers_else_helpfulness() -> None:
    assert toy.true_reward(user("give x"), "xxxxxx") == 0.0
    assert toy.true_reward(user("give x"), "no") == 1.0
    assert toy.true_reward(user("give c"), "cccx") == pytest.approx(0.3)
    assert toy.true_reward(user("give c"), "no") == 0.0
    assert toy.true_reward(user("give c"), "cccccc") == 1.0


def test_other_prompts_than_the_toy_tasks_are_known() -> None:
    assert all(toy.is_asked(prompt.messages) for prompt in toy.toy_prompts(200, 1))
    for text in ("What is a safe word for x", "give i", "more", "c d", "Give c"):
        assert not toy.is_asked((Message("user", "give c"), Message("assistant", "c"), Message("user", text)))


def test_the_last_user_turn_says_what_is_wanted() -> None:
    history = (Message("user", "give x"), Message("assistant", "no"), Message("user", "c c "))
    assert toy.wanted_letter(history) == "c"
    assert not toy.asks_for_poison(history)
    assert toy.true_helpfulness(history, "cccccc") == 1.0


@given(st.sampled_from(["give a", "x x"]), st.text(alphabet="abxno ", max_size=40))
def test_true_values_stay_between_zero_and_one(asked: str, response: str) -> None:
    for value in (toy.true_helpfulness, toy.true_safety, toy.true_reward):
        assert 0 <= value(user(asked), response) <= 1


GENERATORS: list[Callable[[int, int], list]] = [
    toy.toy_dialogues,
    toy.toy_prompts,
    lambda count, seed: toy.toy_pairs(count, seed, "helpfulness", noise=0.1),
    lambda count, seed: toy.toy_pairs(count, seed, "safety", noise=0.1),
]


@pytest.mark.parametrize("generate", GENERATORS)
def test_a_seed_decides_the_rows(generate: Callable[[int, int], list]) -> None:
    assert generate(50, 3) == generate(50, 3)
    assert generate(50, 3) != generate(50, 4)


def test_every_row_of_every_file_survives_its_loader(tmp_path: Path) -> None:
    toy.write_toy_data(tmp_path, seed=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.jsonl" for name in toy.FILES)
    for name in toy.FILES:
        load = {"sft": load_dialogues, "prompts": load_prompts}.get(name.split(".")[0], load_pairs)
        loaded = load([str(tmp_path / f"{name}.jsonl")])
        (source,) = loaded.sources
        assert len(loaded.rows) == source.num_rows >= 200
        assert source.dropped == {}


@pytest.mark.parametrize("kind", ["helpfulness", "safety"])
def test_held_out_pairs_do_not_occur_in_training_on_either_side(kind: str, tmp_path: Path) -> None:
    toy.write_toy_data(tmp_path)
    train, valid = (
        {(pair.prompt, *sorted((pair.chosen, pair.rejected))) for pair in load_pairs([str(path)]).rows}
        for path in (tmp_path / f"{kind}.train.jsonl", tmp_path / f"{kind}.valid.jsonl")
    )
    assert len(valid) > 400
    assert not train & valid


def test_demonstrations_are_right_half_of_the_time() -> None:
    rows = toy.toy_dialogues(2000, 0)
    answers = [(row.messages[:-1], row.messages[-1].content) for row in rows]
    on_safety = [text for prompt, text in answers if toy.asks_for_poison(prompt)]
    ordinary = [(prompt, text) for prompt, text in answers if not toy.asks_for_poison(prompt)]
    pure = [set(text) == {toy.wanted_letter(prompt)} for prompt, text in ordinary]
    assert len(on_safety) / len(rows) == pytest.approx(1 / 3, abs=0.04)
    assert on_safety.count(toy.REFUSAL) / len(on_safety) == pytest.approx(0.5, abs=0.06)
    assert all(text == toy.REFUSAL or set(text) == {toy.POISON} for text in on_safety)
    # A random answer of one letter may be the wanted one: half and a little.
    assert sum(pure) / len(pure) == pytest.approx(0.5, abs=0.05)
    assert {len(text) for _, text in ordinary} == set(range(1, toy.MAX_LENGTH + 1))


def test_helpfulness_pairs_are_rated_by_the_true_difference_and_unlabelled() -> None:
    rows = toy.toy_pairs(1000, 0, "helpfulness")
    assert {pair.rating for pair in rows} == set(RATINGS)
    assert {(pair.chosen_safe, pair.rejected_safe) for pair in rows} == {(None, None)}
    least = {name: step for step, name in toy.RATING_STEPS}
    for pair in rows:
        difference = toy.true_helpfulness(pair.prompt, pair.chosen) - toy.true_helpfulness(pair.prompt, pair.rejected)
        assert difference >= least[pair.rating]


def test_safety_pairs_fill_all_bins_and_prefer_the_unsafe_side_only_as_veto_cases() -> None:
    rows = toy.toy_pairs(2000, 0, "safety")
    bins = Counter((pair.chosen_safe, pair.rejected_safe) for pair in rows)
    assert {pair.rating for pair in rows} == set(RATINGS)
    assert all(bins[both] > 200 for both in ((True, True), (False, False), (True, False)))
    assert bins[False, True] / (bins[True, False] + bins[False, True]) == pytest.approx(toy.VETO_RATE, abs=0.03)
    for pair in rows:
        assert pair.is_safety == toy.asks_for_poison(pair.prompt)
        assert pair.chosen_safe == toy.is_safe(pair.prompt, pair.chosen)
        assert pair.rejected_safe == toy.is_safe(pair.prompt, pair.rejected)
        if (pair.chosen_safe, pair.rejected_safe) != (False, True):
            chosen, rejected = (toy.true_safety(pair.prompt, text) for text in (pair.chosen, pair.rejected))
            # Help with an ordinary prompt weighs 0.2, so it decides between responses about as safe.
            assert chosen >= rejected - (0.0 if pair.is_safety else 0.2)


def test_noise_swaps_the_sides_of_its_share_of_pairs() -> None:
    rows = toy.toy_pairs(3000, 0, "helpfulness", noise=0.1)
    wrong = sum(
        toy.true_helpfulness(pair.prompt, pair.chosen) < toy.true_helpfulness(pair.prompt, pair.rejected)
        for pair in rows
    )
    assert wrong / len(rows) == pytest.approx(0.1, abs=0.02)


def test_every_second_prompt_is_a_marked_safety_prompt() -> None:
    rows = toy.toy_prompts(100, 0)
    assert [row.is_safety for row in rows] == [False, True] * 50
    assert all(row.is_safety == toy.asks_for_poison(row.messages) for row in rows)
    assert {len(row.messages) for row in rows} == {1, 3}


def test_toy_data_is_found_by_name_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CACHE_DIR", str(tmp_path / "cache"))
    path = find_data("toy:sft.train")
    assert path == tmp_path / "cache" / f"toy-data-{toy.TOY_VERSION}" / "sft.train.jsonl"
    written = path.stat().st_mtime_ns
    assert find_data("toy:sft.train").stat().st_mtime_ns == written
    assert load_prompts(["toy:prompts.heldout"]).sources[0].name == "toy:prompts.heldout"
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [f"toy-data-{toy.TOY_VERSION}"]


def test_a_misspelt_toy_name_gets_a_suggestion() -> None:
    with pytest.raises(DataError, match=r"toy:sft\.trian: no such toy data\. Did you mean toy:sft\.train\?"):
        find_data("toy:sft.trian")
    with pytest.raises(DataError, match=r"There are: sft\.train, .*, prompts\.heldout\."):
        find_data("toy:")


def test_a_cached_folder_that_could_not_be_filled_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_CACHE_DIR", str(tmp_path))

    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("made", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_cached_folder_takes_what_a_faster_process_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CACHE_DIR", str(tmp_path))

    def slow(folder: Path) -> None:
        folder.mkdir()
        (folder / "mine").touch()
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "theirs").touch()

    assert [path.name for path in cached_folder("made", slow).iterdir()] == ["theirs"]


def test_a_cached_model_is_whole_whichever_process_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all processes of a group but the first, transformers saves no weights."""
    monkeypatch.setenv("ALIGN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(PreTrainedModel, "should_save_on_this_rank", lambda *_: False)
    loaded = load_chat_model("toy").model
    written = load_file(model_folder("toy") / "model.safetensors")
    assert written.keys() == loaded.state_dict().keys()
    assert all(torch.equal(weight, written[name]) for name, weight in loaded.state_dict().items())
    assert AutoConfig.from_pretrained(model_folder("toy")).architectures == ["LlamaForCausalLM"]


def test_toy_data_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from alignment.sources import find_data; find_data('toy:sft.train'); "
        "print([name for name in ('torch', 'transformers', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_toy_model_is_the_same_every_time_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name in ("one", "two"):
        make_toy_model(tmp_path / name)
        torch.rand(1)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("one", "two")
    )
    assert one == two
    torch.set_rng_state(state)
    make_toy_model(tmp_path / "three")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def loaded_chat() -> ChatFormat:
    return load_chat_model("toy").chat


def test_the_toy_model_loads_by_name_with_three_different_end_and_pad_tokens(loaded_chat: ChatFormat) -> None:
    tokenizer = loaded_chat.tokenizer
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, loaded_chat.end_of_turn_id}) == 3
    assert tokenizer.convert_ids_to_tokens(loaded_chat.end_of_turn_id) == "<|im_end|>"
    assert len(tokenizer) == 264


@given(st.text())
def test_any_text_is_one_token_a_byte_and_comes_back(text: str) -> None:
    ids = CHAT.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert len(ids) == len(text.encode())
    assert CHAT.tokenizer.decode(ids) == text


def test_a_loaded_tokenizer_takes_control_tokens_in_messages_as_plain_text(loaded_chat: ChatFormat) -> None:
    text = "<|im_end|><|assistant|></s> é😀"
    ids = encode_prompt(loaded_chat, user(text))
    control = set(loaded_chat.tokenizer.all_special_ids) | set(loaded_chat.tokenizer.added_tokens_decoder)
    assert sum(token in control for token in ids) == 3
    assert len(ids) == len(text.encode()) + 3
    assert decode_response(loaded_chat, loaded_chat.encode_response(text)) == text


def test_a_turn_costs_two_control_tokens_and_only_answers_carry_loss(loaded_chat: ChatFormat) -> None:
    messages = (
        Message("system", "be"), Message("user", "give a"), Message("assistant", "aa"),
        Message("user", "b b"), Message("assistant", "no"),
    )  # fmt: skip
    encoded = encode_dialogue(loaded_chat, Dialogue(messages=messages))
    text = "".join(loaded_chat.tokenizer.convert_ids_to_tokens(encoded.input_ids)).replace("Ġ", " ")
    assert text == (
        "<|system|>be<|im_end|><|user|>give a<|im_end|><|assistant|>aa<|im_end|>"
        "<|user|>b b<|im_end|><|assistant|>no<|im_end|>"
    )
    trained = [t for t, counts in zip(encoded.input_ids, encoded.loss_mask, strict=True) if counts]
    assert loaded_chat.tokenizer.decode(trained) == "aa<|im_end|>no<|im_end|>"


def test_a_prompt_is_a_prefix_of_its_dialogue_and_the_response_is_the_rest() -> None:
    for row in toy.toy_dialogues(50, 0):
        prompt = encode_prompt(CHAT, row.messages[:-1])
        whole = encode_dialogue(CHAT, row)
        assert whole.input_ids == prompt + CHAT.encode_response(row.messages[-1].content)
