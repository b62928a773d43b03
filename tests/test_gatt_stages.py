"""`align gatt`, `align eval kind=gatt` and `align distil` on the toy model, with models whose answers are scripted."""

import json
import time
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from scripted import COMMON, PROMPTS, Interrupted, ScriptedSpeaker, distil_config, gatt_config, scored_by_length
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.chat import decode_response, encode_prompt, has_system_turn
from alignment.chat_formats import CHATML, chat_format
from alignment.cli import distil
from alignment.cli.main import run_stage
from alignment.cli.pipeline import load_pipeline
from alignment.cli.stages import STAGES
from alignment.config import load_config
from alignment.data import load_dialogues
from alignment.dialogue import Message
from alignment.errors import ConfigError, DataError
from alignment.headlines import one_line
from alignment.model_folders import load_chat_of
from alignment.progress import ProgressBar
from alignment.report import fine_tuning
from alignment.report.reading import read_runs
from alignment.sampling.prompts import sampling_params
from alignment.sampling.protocol import Sample
from alignment.sampling.torch_engine import TorchSampler
from reward_models.score import score
from rlhf.config import EvalConfig
from sft import context_distillation, conversation, gatt, gatt_evaluation
from sft.answer_log import NoAnswer, Turn
from sft.attention_mass import attention_mass, is_readable, spans
from sft.config import GattConfig, GattEvalConfig
from sft.context_distillation import summarize, why_not_kept
from sft.ghost_attention import REASONS, Answer, context
from sft.safety_preprompts import TEMPLATES, template_of, with_preprompt


@pytest.fixture
def speak(monkeypatch):
    """`speak(answer)` puts a scripted speaker in the place of the model and returns it."""

    def install(answer, **options) -> ScriptedSpeaker:
        speaker = ScriptedSpeaker(answer, **options)
        monkeypatch.setattr(conversation.Speaker, "open", classmethod(lambda cls, *_, **__: nullcontext(speaker)))
        return speaker

    return install


def test_a_context_of_exactly_the_limit_can_be_asked():
    (chat, _), messages = load_chat_of("toy", "auto"), (Message("user", "hello"),)
    ids = encode_prompt(chat, messages)
    assert conversation.encode_within(chat, messages, len(ids)) == (ids, None)
    assert conversation.encode_within(chat, messages, len(ids) - 1) == (ids, "too_long")


def test_gatt_keeps_dialogues_whose_every_answer_keeps_the_instruction(tmp_path, speak):
    """One opening is answered in lower case on the second turn: that dialogue is rejected and counted."""
    speaker = speak(lambda messages: ["ok"] if len(messages) == 3 and "c" in messages[0].content[-1] else ["no", "OK"])
    result = gatt.run(gatt_config(tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "sampled.jsonl").read_text().splitlines()]
    rejected = [row for row in rows if row["dropped"]]
    assert rejected and [row["dropped"] for row in rejected] == ["instruction_not_kept"] * len(rejected)
    assert all(len(row["answers"]) == 1 and row["user_turns"][0].endswith("c") for row in rejected)
    assert result["dialogues"] == 6 - len(rejected) > 0
    kept = load_dialogues([str(tmp_path / "run" / "dialogues.jsonl")]).rows
    assert len(kept) == result["dialogues"]
    for dialogue in kept:
        users = [message.content for message in dialogue.messages if message.role == "user"]
        assert dialogue.train_on == "last"
        assert "capital letters" in users[0] and not any("capital letters" in turn for turn in users[1:])
        assert [message.content for message in dialogue.messages if message.role == "assistant"] == ["OK"] * len(users)
    for messages in speaker.asked:
        assert all("capital letters" in message.content for message in messages if message.role == "user")
    for dialogue in load_dialogues([str(tmp_path / "run" / "as_sampled.jsonl")]).rows:
        assert all("capital letters" in message.content for message in dialogue.messages if message.role == "user")
        assert dialogue.train_on == "last"
    rate = result["kept_by_kind"]["capitals"]
    assert (rate["value"], rate["count"]) == (result["dialogues"] / 6, 6)
    assert "dialogues" in one_line(result)


def test_dialogues_have_every_number_of_turns_that_is_asked_for(tmp_path, speak):
    """Only last answers are trained: with one length, no other turn would learn to keep the instruction."""
    speak(lambda messages: ["OK"])
    gatt.run(gatt_config(tmp_path / "run", "prompts.max_prompts=60", "prompts.min_turns=2", "prompts.turns=4"))
    dialogues = load_dialogues([str(tmp_path / "run" / "dialogues.jsonl")]).rows
    lengths = [len(dialogue.messages) // 2 for dialogue in dialogues]
    assert set(lengths) == {2, 3, 4} and min(lengths.count(length) for length in (2, 3, 4)) >= 10
    with pytest.raises(ConfigError, match=r"prompts.min_turns = 5 is more than prompts.turns = 3"):
        gatt_config(tmp_path / "other", "prompts.min_turns=5")


def test_half_of_the_dialogues_state_the_short_form(tmp_path, speak):
    speak(lambda messages: ["OK"])
    config = gatt_config(tmp_path / "run", "prompts.max_prompts=100", "sampling.max_rows=8")
    gatt.run(config)
    dialogues = load_dialogues([str(tmp_path / "run" / "dialogues.jsonl")]).rows
    short = sum(dialogue.messages[0].content.startswith("Style:") for dialogue in dialogues)
    assert len(dialogues) == 100 and 35 <= short <= 65  # 50 expected, standard deviation 5


def test_gatt_says_what_to_do_where_no_dialogue_is_finished(tmp_path, speak):
    """Each reason has its count and its remedy, and no other reason's."""
    speak(lambda messages: ["no"])
    with pytest.raises(DataError) as caught:
        gatt.run(gatt_config(tmp_path / "run"))
    assert str(caught.value) == (
        "no dialogue was finished: 6 instruction not kept: raise sampling.num_candidates or prompts.max_prompts, or "
        "name other instructions.kinds."
    )
    speak(lambda messages: ["OK"] if len(messages) == 1 else None)
    with pytest.raises(DataError, match=r"finished: 6 too long: lower prompts\.turns or sampling\.max_new_tokens, or"):
        gatt.run(gatt_config(tmp_path / "long"))
    speak(lambda messages: ["OK"], is_finished=False)
    with pytest.raises(DataError, match=r"finished: 6 cut off: raise sampling\.max_new_tokens\.$"):
        gatt.run(gatt_config(tmp_path / "cut"))


def test_every_reason_for_a_dialogue_that_ended_early_has_a_remedy():
    assert set(gatt._REMEDIES) == {*REASONS, *get_args(NoAnswer)}


def shout_back(messages):
    """An answer of its own for every question."""
    return [f"YES, {messages[-1].content[-1].upper()}"]


def test_gatt_goes_on_without_sampling_again_what_is_on_disk(tmp_path, speak):
    """Four dialogues at a time; the model fails in the second lot, and a half-written row stands at the file's end."""
    settings = ["sampling.max_rows=1", "prompts.max_prompts=12"]
    speak(shout_back)
    gatt.run(gatt_config(tmp_path / "whole", *settings))

    def fail_later(messages):
        if (tmp_path / "run" / "sampled.jsonl").exists():
            raise Interrupted
        return shout_back(messages)

    speak(fail_later)
    with pytest.raises(Interrupted):
        gatt.run(gatt_config(tmp_path / "run", *settings))
    whole = (tmp_path / "whole" / "sampled.jsonl").read_text()
    with (tmp_path / "run" / "sampled.jsonl").open("a") as file:  # one row of the next lot, and a half of another
        file.write(whole.splitlines(keepends=True)[4] + '{"instruction": "In the who')
    speaker = speak(shout_back)
    gatt.run(gatt_config(tmp_path / "run", *settings), resume=True)
    for name in ("sampled.jsonl", "dialogues.jsonl", "as_sampled.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert len([messages for messages in speaker.asked if len(messages) == 1]) == 8, "the first lot is not asked again"


def fails_at(turn, answer):
    """Answers as `answer` does, until a dialogue of `turn` user turns is asked."""

    def speaks(messages):
        if len(messages) >= 2 * turn - 1:
            raise Interrupted
        return answer(messages)

    return speaks


def test_within_a_lot_no_finished_turn_is_sampled_again(tmp_path, speak):
    """All dialogues in one lot: interrupted in turn 3, again at once, and the line of turn 2 is half written."""
    settings = ["prompts.max_prompts=12", "prompts.min_turns=1", "prompts.turns=4"]
    answer = lambda messages: None if messages[-1].content.endswith("a") else shout_back(messages)  # noqa: E731
    asked = speak(answer).asked
    gatt.run(gatt_config(tmp_path / "whole", *settings))
    by_turn = [[messages for messages in asked if len(messages) == 2 * turn + 1] for turn in range(4)]
    assert min(map(len, by_turn)) > 1, "several turns, each with several dialogues"

    for attempt in range(2):
        speaker = speak(fails_at(3, answer))
        with pytest.raises(Interrupted):
            gatt.run(gatt_config(tmp_path / "run", *settings), resume=attempt > 0)
        assert speaker.num_calls == (1 if attempt else 3), "what is on disk is not asked for again"
    assert not (tmp_path / "run" / "sampled.jsonl").exists()
    turns = tmp_path / "run" / "sampled.turns.jsonl"
    assert [json.loads(line)["turn"] for line in turns.read_text().splitlines()] == [0, 1]
    turns.write_text(turns.read_text()[:-9])

    speaker = speak(answer)
    gatt.run(gatt_config(tmp_path / "run", *settings), resume=True)
    assert speaker.num_calls == 3 and speaker.asked == list(chain(*by_turn[1:]))
    for name in ("sampled.jsonl", "dialogues.jsonl", "as_sampled.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert not turns.exists(), "it goes with the lot's end"


@pytest.mark.parametrize("stage", ["gatt", "eval", "distil"])
def test_time_before_an_interruption_counts(tmp_path, speak, monkeypatch, stage):
    """Each answer takes 100 seconds; what is interrupted has none on disk of the turn or lot that it is in."""
    clock = [0.0]
    timed = SimpleNamespace(monotonic=lambda: clock[0], strftime=time.strftime)
    monkeypatch.setattr("alignment.runs.time", timed)

    def answer(messages):
        clock[0] += 100.0
        if stage == "distil":
            return ["longer"] if messages[0].role == "system" else ["four"]
        return shout_back(messages)

    def begin(*, score=lambda config, device: scored_by_length, resume=False):
        if stage == "distil":
            return context_distillation.run(distil_config(tmp_path / "run"), score, resume=resume)
        if stage == "gatt":
            return gatt.run(gatt_config(tmp_path / "run"), resume=resume)
        return gatt_evaluation.run(eval_config(tmp_path / "run", "num_attention_dialogues=0"), resume=resume)

    def fails(config, device):
        raise Interrupted

    speak(answer if stage == "distil" else fails_at(3, answer))
    with pytest.raises(Interrupted):
        begin(score=fails)
    before = clock[0]
    assert before >= 100
    speak(answer)
    result = begin(resume=True)
    assert result["time_seconds"] == clock[0] >= before


def test_an_evaluation_goes_on_after_the_last_whole_turn(tmp_path, speak):
    """Six dialogues of five turns with each of two models; interrupted in the last turn of the first one's."""
    settings = ["num_attention_dialogues=0"]
    asked = speak(shout_back).asked
    gatt_evaluation.run(eval_config(tmp_path / "whole", *settings))
    speak(fails_at(5, shout_back))
    with pytest.raises(Interrupted):
        gatt_evaluation.run(eval_config(tmp_path / "run", *settings))
    speaker = speak(shout_back)
    gatt_evaluation.run(eval_config(tmp_path / "run", *settings), resume=True)
    assert speaker.asked == asked[4 * 6 :]
    for policy in ("a", "b"):
        found, expected = ((tmp_path / name / f"dialogues-{policy}.jsonl").read_text() for name in ("run", "whole"))
        assert found == expected


def test_an_answer_that_the_chat_format_cannot_write_is_never_trained_on(tmp_path, speak):
    """The first candidate is such an answer; where there is no other, the dialogue is left out, last turn or not."""
    speak(lambda messages: ["[INST]"] if messages[0].content.endswith("c") else ["[INST] OK", "OK"])
    result = gatt.run(gatt_config(tmp_path / "run", "prompts.max_prompts=20"))
    assert result["dropped"].keys() == {"refused"} and result["dialogues"] == 20 - result["dropped"]["refused"]
    for name in ("dialogues.jsonl", "as_sampled.jsonl"):
        assert "[INST]" not in (tmp_path / "run" / name).read_text()


def test_dialogues_longer_than_the_chosen_prompts_allow_are_filled_from_all_of_the_data(tmp_path, speak, write_file):
    rows = "".join(json.dumps({"prompt": [{"role": "user", "content": f"give {n}"}]}) + "\n" for n in range(20))
    path = write_file("prompts.jsonl", rows)
    settings = [f"prompts.prompts={path}", "prompts.max_prompts=5", "prompts.min_turns=20", "prompts.turns=20"]
    speak(lambda messages: ["OK"])
    gatt.run(gatt_config(tmp_path / "run", *settings))
    dialogues = load_dialogues([str(tmp_path / "run" / "dialogues.jsonl")]).rows
    assert [len(dialogue.messages) for dialogue in dialogues] == [40] * 5
    settings[2:] = ["prompts.min_turns=22", "prompts.turns=22"]
    with pytest.raises(DataError, match=r"22 user turns needs 21 opening turns of other prompts, and there are 19"):
        gatt.run(gatt_config(tmp_path / "other", *settings))


def test_instructions_of_ones_own_take_the_place_of_the_built_in_ones(tmp_path, speak, write_file):
    speak(lambda messages: ["Aye, matey"])
    own = write_file("own.jsonl", '{"kind": "ending", "value": "matey"}\n')
    result = gatt.run(gatt_config(tmp_path / "run", f"instructions.own={own}"))
    assert result["kept_by_kind"].keys() == {"ending"} and result["dialogues"] == 6
    wrong = write_file("wrong.jsonl", '{"kind": "ending", "value": "x"}\n{"kind": "mood", "value": "glad"}\n')
    with pytest.raises(DataError, match=r"wrong.jsonl:2: \"kind\" is 'mood'"):
        gatt.run(gatt_config(tmp_path / "other", f"instructions.own={wrong}"))


def eval_config(folder: Path, *extra: str) -> GattEvalConfig:
    settings = ["policies.a=toy", "policies.b=toy", "run.device=cpu", *PROMPTS, "prompts.turns=5"]
    return load_config(GattEvalConfig, None, [*settings, "instructions.kinds=[capitals]", *extra, f"run.dir={folder}"])


def test_adherence_is_judged_by_turn_with_the_instruction_in_the_first_only(tmp_path, monkeypatch):
    """Model `a` keeps it for three answers, `b` for all: turn 4 and 5 differ by everything, turn 2 by nothing."""
    speakers = {
        "a": ScriptedSpeaker(lambda messages: ["OK"] if len(messages) <= 5 else ["ok"]),
        "b": ScriptedSpeaker(lambda messages: ["OK"]),
    }
    order = iter(speakers.values())
    monkeypatch.setattr(conversation.Speaker, "open", classmethod(lambda cls, *_, **__: nullcontext(next(order))))
    result = gatt_evaluation.run(eval_config(tmp_path / "run", "num_attention_dialogues=0", "report_turns=[2, 4, 9]"))
    rates = {name: [entry["value"] for entry in row["by_turn"]] for name, row in result["policies"].items()}
    assert rates == {"a": [1, 1, 1, 0, 0], "b": [1, 1, 1, 1, 1]}
    assert result["policies"]["b"]["gain"]["4"]["value"] == 1 and result["policies"]["b"]["gain"]["2"]["value"] == 0
    assert result["policies"]["a"]["by_kind"]["capitals"]["4"]["value"] == 0
    for speaker in speakers.values():
        for messages in speaker.asked:
            users = [message.content for message in messages if message.role == "user"]
            assert "capital letters" in users[0] and not any("capital letters" in turn for turn in users[1:])
    assert (tmp_path / "run" / "adherence.png").stat().st_size > 1000
    table = gatt_evaluation.report_table(result)
    assert [column.header for column in table.columns] == ["policy", "turn 2", "turn 4"]
    assert "2 policies in 6 dialogues" in one_line(result)


def test_a_dialogue_that_no_longer_fits_ends_and_is_not_counted_later(tmp_path, speak):
    speak(lambda messages: None if len(messages) > 5 else ["OK"])
    result = gatt_evaluation.run(eval_config(tmp_path / "run", "num_attention_dialogues=0"))
    assert [entry["count"] for entry in result["policies"]["a"]["by_turn"]] == [6, 6, 6]


def test_where_no_dialogue_fits_there_is_no_table(tmp_path, speak):
    speak(lambda messages: None)
    with pytest.raises(
        DataError, match=r"policies.a: .*prompts: none fits into 400 tokens \(prompts.max_prompt_length\)"
    ):
        gatt_evaluation.run(eval_config(tmp_path / "run"))


def test_answers_cut_off_at_the_length_limit_do_not_keep_what_a_cut_helps_with(tmp_path, speak):
    speak(lambda messages: ["one two"], is_finished=False)
    config = eval_config(tmp_path / "run", "num_attention_dialogues=0", "instructions.kinds=[max_words]")
    row = gatt_evaluation.run(config)["policies"]["a"]
    assert [entry["value"] for entry in row["by_turn"]] == [0.0] * 5
    assert row["cut_off_by_turn"] == [1.0] * 5


def test_instructions_that_no_program_can_judge_are_not_measured(tmp_path, write_file):
    own = write_file("own.jsonl", '{"full": "you speak like a pirate", "short": "Pirate."}\n')
    with pytest.raises(DataError, match=r"no program can judge .*pirate"):
        gatt_evaluation.run(eval_config(tmp_path / "run", f"instructions.own={own}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "row",
    [
        '{"messages": [{"role": "user", "content": "give c"}, {"role": "assistant", "content": "c"}]}',
        '{"prompt": [{"role": "user", "content": "give c"}], "chosen": "c", "rejected": "d"}',
        '{"chosen": [{"role": "user", "content": "give c"}, {"role": "assistant", "content": "c"}],'
        ' "rejected": [{"role": "user", "content": "give c"}, {"role": "assistant", "content": "d"}]}',
    ],
)
def test_demonstrations_and_pairs_seed_dialogues_as_prompts_do(row, write_file):
    path = write_file("rows.jsonl", row + "\n")
    config = gatt_config(Path("r"), f"prompts.prompts={path}")
    [prompt] = conversation.load_seeds(config.prompts).rows
    assert prompt.messages == (Message("user", "give c"),)


def test_eval_kind_gatt_runs_from_the_command_line_on_a_real_model(tmp_path):
    settings = ["kind=gatt", "policies.base=toy", "run.device=cpu", *PROMPTS, "prompts.turns=3"]
    settings += ["instructions.kinds=[capitals, ending]", "sampling.max_new_tokens=6", f"run.dir={tmp_path / 'run'}"]
    run_stage("eval", settings)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [entry["count"] for entry in result["policies"]["base"]["by_turn"]] == [6, 6, 6]
    [[*turns], *_] = result["attention"]["base"]
    assert len(turns) == 3 and all(0 < mass < 1 for mass in turns)
    assert (tmp_path / "run" / "attention.png").stat().st_size > 1000


def test_the_attention_picture_can_be_left_out_until_a_run_is_resumed(tmp_path, monkeypatch):
    settings = ["kind=gatt", "policies.base=toy", "run.device=cpu", *PROMPTS, "prompts.turns=2"]
    settings += ["instructions.kinds=[capitals]", "sampling.max_new_tokens=4", f"run.dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(gatt_evaluation, "attention_picture", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_stage("eval", settings)
    run_stage("eval", [*settings, "num_attention_dialogues=0"], resume=True)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["attention"] == {}


def test_the_attention_picture_has_only_dialogues_that_every_policy_can_read(tmp_path, speak, monkeypatch):
    """The second policy's context is a token too short for the longest of the six dialogues."""
    speak(lambda messages: ["OK"])
    settings = ["kind=gatt", "policies.a=toy", "policies.b=toy", "run.device=cpu", *PROMPTS, "prompts.turns=2"]
    settings += ["instructions.kinds=[capitals]", "num_attention_dialogues=6"]
    asked = []
    monkeypatch.setattr(gatt_evaluation, "attention_picture", lambda _, rows: asked.append(rows) or [[0.5]])
    run_stage("eval", [*settings, f"run.dir={tmp_path / 'all'}"])
    chat, length = load_chat_of("toy")
    texts = ("instruction", "user_turns", "answers")
    sizes = [len(spans(chat, **{name: row[name] for name in texts})[0]) for row in asked[0]]
    assert [len(rows) for rows in asked] == [6, 6] and is_readable(chat, sizes[0], asked[0][0])
    asked.clear()
    contexts = iter([(chat, length), (chat, max(sizes) - 1)])
    monkeypatch.setattr(gatt_evaluation, "load_chat_of", lambda *_: next(contexts))
    run_stage("eval", [*settings, f"run.dir={tmp_path / 'some'}"])
    assert [len(rows) for rows in asked] == [6 - sizes.count(max(sizes))] * 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_instructions_place_is_found_and_its_share_of_attention_is_that_of_the_definition(family, tokenizer):
    chat = chat_format(tokenizer, "chatml")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), initializer_range=0.2, **shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    turns = ["Act as Ada.\nhi", "why?"]
    ids, (start, stop), answers = spans(chat, "Act as Ada.", turns, ["hello", "because"])
    assert decode_response(chat, ids[start:stop]) == "Act as Ada."
    assert [decode_response(chat, ids[a:b]) for a, b in answers] == ["hello", "because"]
    before = model.config._attn_implementation
    found = attention_mass(model, ids, (start, stop), answers)
    assert model.config._attn_implementation == before

    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    for layer, table in enumerate(attentions):
        for turn, (first, last) in enumerate(answers):
            shares = [
                sum(table[0, head, query, key].item() for key in range(start, stop))
                for head in range(table.shape[1])
                for query in range(first, last)
            ]
            assert found[layer, turn].item() == pytest.approx(sum(shares) / len(shares), abs=1e-5)


def test_a_speaker_gives_each_context_its_candidates_and_leaves_out_long_ones(make_llama, make_tokenizer):
    tokenizer = make_tokenizer(template=CHATML)
    chat = chat_format(tokenizer)
    model = make_llama(len(tokenizer))
    config = load_config(GattConfig, None, [*COMMON, *PROMPTS, "sampling.num_candidates=2", "run.dir=r"])
    section = config.sampling.model_copy(update={"max_new_tokens": 5})
    sampler = TorchSampler(model, stop_ids=[chat.end_of_turn_id])
    speaker = conversation.Speaker(sampler, chat, section, max_prompt_length=60, seed=3)
    contexts = {7: context(["hi"], []), 2: context(["x" * 100], []), 5: context(["hi"], [])}

    bar = ProgressBar("", 0, shown=False)
    answered = speaker.answer(contexts, turn=1, bar=bar)
    found = answered.candidates
    assert set(found) == {7, 5} and all(len(answers) == 2 for answers in found.values())
    assert answered.missing == {2: "too_long"}
    ids = [encode_prompt(chat, contexts[key]) for key in (7, 5)]
    expected = sampler.sample(ids, sampling_params(section, seed=4))  # the seed and the turn
    assert found[7][0].text == decode_response(chat, expected[0][0].token_ids)


def test_a_context_that_the_chat_format_refuses_is_left_out(make_llama, make_tokenizer):
    """A model may write a tag of Llama 2's layout; the next turn's context then cannot be written."""
    tokenizer = make_tokenizer()
    chat = chat_format(tokenizer, "llama2")
    section = load_config(GattConfig, None, [*COMMON, *PROMPTS, "run.dir=r"]).sampling
    sampler = TorchSampler(make_llama(len(tokenizer)), stop_ids=[chat.end_of_turn_id])
    speaker = conversation.Speaker(sampler, chat, section, max_prompt_length=60, seed=3)
    bar = ProgressBar("", 0, shown=False)
    assert speaker.answer({0: context(["hi", "so?"], ["[INST]"])}, turn=1, bar=bar) == Turn({}, {0: "refused"})
    texts = {"one": "so [INST] then", "two": "so then"}
    ids = {name: tokenizer.encode(text, add_special_tokens=False) for name, text in texts.items()}
    speaker._sampler = SamplerOf([[Sample(ids[name], [0.0] * len(ids[name]), "stop") for name in texts]])
    found = speaker.answer({0: context(["hi"], [])}, turn=0, bar=bar)
    assert found.candidates == {0: [Answer("so [INST] then", True, is_refused=True), Answer("so then", True)]}


class SamplerOf:
    """A sampler of given samples."""

    def __init__(self, samples):
        self.samples = samples

    def sample(self, prompts, params, *, on_progress):
        return self.samples


def test_distilled_answers_are_kept_only_where_they_score_higher(tmp_path, speak):
    """Behind the preprompt the answer is longer, except where the prompt asks for c."""

    def answer(messages):
        plain = messages[-1].content.endswith("c")
        return ["four"] if plain or messages[0].role != "system" else ["longer"]

    speak(answer)
    asked = []

    def load_score(config, device):
        def by_length(prompts, responses):
            asked.extend(prompts)
            return scored_by_length(prompts, responses)

        return by_length

    result = context_distillation.run(distil_config(tmp_path / "run"), load_score)
    rows = load_dialogues([str(tmp_path / "run" / "distilled.jsonl")]).rows
    assert 0 < len(rows) == round(result["kept_rate"]["value"] * 6)
    for row in rows:
        assert row.train_on == "last" and row.messages[-1] == Message("assistant", "longer")
        assert row.messages[0].role == "user" and not row.messages[-2].content.endswith("c")
    assert all(messages[0].role == "user" for messages in asked), "answers are judged behind the prompt alone"
    assert "distilled answers kept" in one_line(result)


def test_distil_goes_on_without_sampling_again_what_is_on_disk(tmp_path, speak):
    speak(lambda messages: ["longer"] if messages[0].role == "system" else ["four"])

    def fails(config, device):
        raise Interrupted

    with pytest.raises(Interrupted):
        context_distillation.run(distil_config(tmp_path / "run"), fails)
    speaker = speak(lambda messages: ["another"])
    result = context_distillation.run(
        distil_config(tmp_path / "run"), lambda config, device: scored_by_length, resume=True
    )
    assert not speaker.asked and result["kept_rate"]["value"] == 1.0


def test_a_distilled_answer_must_end_by_itself_and_beat_the_plain_one():
    row = {"distilled": "no", "is_finished": True, "score_distilled": 1.0, "score_plain": 0.0}
    assert why_not_kept(row) == ""
    assert why_not_kept({**row, "score_distilled": 0.0}) == "not_better"
    assert why_not_kept({**row, "is_finished": False}) == "cut_off"
    assert why_not_kept({**row, "distilled": ""}) == "empty"


def test_the_kept_rate_is_reported_by_category():
    row = {"distilled": "no", "is_finished": True, "score_plain": 0.0, "is_history_cut": False, "has_template": False}
    rows = [{**row, "category": "a", "score_distilled": s} for s in (1.0, -1.0)] + [{**row, "score_distilled": 3.0}]
    found = summarize(rows)
    assert {name: entry["value"] for name, entry in found["kept_by_category"].items()} == {"a": 0.5, "none": 1.0}
    assert found["score_gain"]["value"] == 1.0 and found["kept_rate"]["count"] == 3


def test_templates_go_by_the_names_of_risks_in_the_category():
    """The categories of BeaverTails and, at the end, the subject areas of HarmfulQA, which say nothing of the risk."""
    assert template_of("drug_abuse,weapons,banned_substance", TEMPLATES) == TEMPLATES["drug_abuse"]
    assert template_of("Privacy Violation", TEMPLATES) == TEMPLATES["privacy_violation"]
    assert template_of("non_violent_unethical_behavior", TEMPLATES).startswith("Name what is wrong")
    for subject in ("", "Health and Medicine", "Business and Economics", "Philosophy and Ethics"):
        assert template_of(subject, TEMPLATES) == ""
    own = {"Health and Medicine": "See a doctor.", "weapons": "No."}
    assert template_of("health-and-medicine", own) == "See a doctor."
    assert template_of("drug_abuse,weapons,banned_substance", own) == "No."
    assert template_of("medicine", own) == template_of("weapons", {}) == ""


def test_a_preprompt_goes_before_a_system_turn_or_becomes_one():
    user = Message("user", "hi")
    assert with_preprompt((user,), "Be safe.") == (Message("system", "Be safe."), user)
    assert with_preprompt((Message("system", "Be brief."), user), "Be safe.")[0].content == "Be safe.\nBe brief."


def test_where_the_chat_format_has_no_system_turn_the_preprompt_opens_the_first_user_turn(
    tmp_path, speak, make_tokenizer
):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    assert not has_system_turn(chat_format(make_tokenizer(template=refuses)))
    assert has_system_turn(chat_format(make_tokenizer(), "chatml"))
    turns = (Message("user", "hi"), Message("assistant", "ho"), Message("user", "so?"))
    behind = with_preprompt(turns, "Be safe.", has_system_turn=False)
    assert behind == (Message("user", "Be safe.\nhi"), *turns[1:])
    speaker = speak(lambda messages: ["longer" if "assistant" in messages[0].content else "four"])
    speaker.has_system_turn = False
    context_distillation.run(distil_config(tmp_path / "run"), lambda c, d: scored_by_length)
    assert len(speaker.asked) == 12 and all(messages[0].role == "user" for messages in speaker.asked)
    for row in load_dialogues([str(tmp_path / "run" / "distilled.jsonl")]).rows:
        assert row.messages[-1].content == "longer" and "assistant" not in row.messages[0].content


def test_the_gain_where_both_answers_ended_stands_beside_that_of_all():
    """One gain of 1 between answers that ended, one of -3 and a kept one of 5 against answers that were cut off."""
    row = {"distilled": "no", "is_finished": True, "score_plain": 0.0, "is_history_cut": False, "has_template": False}
    rows = [
        {**row, "is_plain_finished": True, "score_distilled": 1.0},
        {**row, "is_plain_finished": False, "score_distilled": -3.0},
        {**row, "is_plain_finished": False, "score_distilled": 5.0},
    ]
    found = summarize(rows)
    assert (found["score_gain"]["value"], found["score_gain"]["count"]) == (1.0, 3)
    assert (found["score_gain_ended"]["value"], found["score_gain_ended"]["count"]) == (1.0, 1)
    assert found["kept_against_cut_off"] == 1
    older = summarize([{**row, "score_distilled": 1.0}])
    assert (older["score_gain_ended"]["count"], older["kept_against_cut_off"]) == (0, 0)


def test_align_distil_scores_with_the_reward_model_it_is_given(tmp_path, speak, reward_folder):
    """Twenty prompts, so that some answer is preferred; the scores are those of the model for prompt and answer."""
    speak(lambda messages: ["longer"] if messages[0].role == "system" else [messages[-1].content[-1]])
    distil.run(distil_config(tmp_path / "run", f"safety={reward_folder}", "prompts.max_prompts=20"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "scored.jsonl").read_text().splitlines()]
    expected = score(reward_folder, [row["prompt"] for row in rows], [[row["plain"], row["distilled"]] for row in rows])
    found = [[row["score_plain"], row["score_distilled"]] for row in rows]
    assert len(rows) == 20
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-3, rtol=0)
    assert STAGES["distil"].run_function() is distil.run


def test_what_the_safety_model_cannot_read_is_counted_and_the_others_are_kept(
    tmp_path, speak, reward_folder, monkeypatch
):
    """Answers without end are more tokens than the reward model's context, which ends nothing but their own rows."""
    endless, load = "x" * 2000, distil._load_score

    def load_score(config, device):  # it reads the others; a random model may prefer none of the distilled ones
        score = load(config, device)
        return lambda *given: score(*given) and scored_by_length(*given)

    monkeypatch.setattr(distil, "_load_score", load_score)
    speak(lambda messages: [endless if messages[-1].content.endswith("x") else "longer" * (1 + len(messages[0].role))])
    result = distil.run(distil_config(tmp_path / "run", f"safety={reward_folder}", "prompts.max_prompts=40"))
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    unscored = sum(row["plain"] == endless for row in answers)
    assert 0 < unscored == result["dropped"]["unscored"] and result["prompts"] == 40 - unscored
    speak(lambda messages: [endless])
    with pytest.raises(DataError, match="this reward model can read none of the prompts"):
        distil.run(distil_config(tmp_path / "none", f"safety={reward_folder}"))


def test_a_prompt_too_long_behind_its_preprompt_loses_its_oldest_turns_in_both_contexts(tmp_path, speak):
    """More than three messages do not fit: system, one exchange and the question are too many."""
    speaker = speak(lambda messages: None if len(messages) > 3 else ["longer" if messages[0].role == "system" else "x"])
    context_distillation.run(distil_config(tmp_path / "run", "prompts.max_prompts=20"), lambda c, d: scored_by_length)
    rows = load_dialogues([str(tmp_path / "run" / "distilled.jsonl")]).rows
    assert len(rows) == 20 and all(len(row.messages) == 2 for row in rows)
    assert max(map(len, speaker.asked)) == 2


@pytest.mark.parametrize(("reason", "turns"), [("too_long", 1), ("refused", 5)])
def test_only_what_is_too_long_loses_turns(reason, turns):
    """A turn that the chat format refuses is not to be left out without a word."""
    prompt = tuple(Message(("user", "assistant")[index % 2], "x") for index in range(5))
    found = context_distillation._shortened(lambda messages: reason if len(messages) > 1 else None, prompt, tuple)
    assert len(found) == turns


def test_every_prompt_without_a_distilled_row_is_counted_by_reason(tmp_path, speak, write_file):
    """One prompt for each reason, one kept; the longest loses an exchange, and two have a template of their risk."""
    texts = ["kept", "worse", "plain is refused", "distilled is refused", "long", "nothing", "short"]
    rows = [{"prompt": [{"role": "user", "content": text}], "category": "self_harm"} for text in texts]
    rows[0]["category"], rows[1]["category"] = "Health and Medicine", ""
    turns = [Message("user", "old"), Message("assistant", "old"), Message("user", "short")]
    rows[6]["prompt"] = [message.to_json() for message in turns]
    path = write_file("prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def answer(messages):
        question, is_distilled = messages[-1].content, messages[0].role == "system"
        if question == "long" or len(messages) > 3:
            return None
        if question.endswith("refused"):
            return ["[INST] or not" if is_distilled == question.startswith("distilled") else "good"]
        if question == "nothing" and is_distilled:
            return [""]
        return ["longer" if is_distilled and question != "worse" else "four"]

    speak(answer)
    result = context_distillation.run(
        distil_config(tmp_path / "run", f"prompts.prompts={path}", "prompts.max_prompts=7"),
        lambda c, d: scored_by_length,
    )
    assert result["dropped"] == {"empty": 1, "not_better": 1, "refused": 2, "too_long": 1}
    assert (result["prompts"], result["history_cut"], result["with_template"]) == (4, 1, 2)
    assert one_line(result).endswith("; left out 1 empty, 1 not better, 2 refused, 1 too long, cut the history of 1")
    kept = load_dialogues([str(tmp_path / "run" / "distilled.jsonl")]).rows
    assert [row.messages[0].content for row in kept] == ["kept", "short"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["dropped"], manifest["history_cut"]) == (result["dropped"], 1)
    [table] = fine_tuning.made_data(read_runs([tmp_path / "run"])).tables
    assert "2 refused" in table.rows[0][3].text


def test_where_no_prompt_can_be_answered_the_reason_is_told(tmp_path, speak):
    speak(lambda messages: None)
    for length, reason in ((300, r"300 tokens \(prompts.max_prompt_length"), (400, r"384 tokens \(what the models'")):
        config = distil_config(tmp_path / f"run-{length}", f"prompts.max_prompt_length={length}")
        with pytest.raises(DataError, match=f"prompts: none fits into {reason}"):
            context_distillation.run(config, lambda config, device: scored_by_length)
    speak(lambda messages: ["[INST]"])
    with pytest.raises(DataError, match=r"prompts: the model's chat format refuses all of them"):
        context_distillation.run(distil_config(tmp_path / "other"), lambda config, device: scored_by_length)


def test_an_empty_list_of_preprompts_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"preprompts"):
        distil_config(tmp_path / "run", "preprompts=[]")


def test_where_no_distilled_answer_is_better_the_scores_are_there_to_look_at(tmp_path, speak):
    speak(lambda messages: ["four"])
    with pytest.raises(DataError, match=r"no distilled answer may be kept \(6 not better\). Look at scored.jsonl"):
        context_distillation.run(distil_config(tmp_path / "run"), lambda config, device: scored_by_length)
    assert len((tmp_path / "run" / "scored.jsonl").read_text().splitlines()) == 6


def test_kind_chooses_the_settings_of_eval():
    assert STAGES["eval"].of_kind("gatt").config_class() is GattEvalConfig
    assert STAGES["eval"].of_kind(None) is STAGES["eval"] is STAGES["eval"].of_kind("policies")
    assert STAGES["rm"].of_kind("safety") is STAGES["rm"]


def test_a_kind_of_evaluation_that_there_is_not_is_told_those_there_are(tmp_path, write_file):
    problem = r"kind = 'gat': the eval stage has no such kind. Use one of policies, gatt"
    with pytest.raises(ConfigError, match=f"command line: {problem}"):
        run_stage("eval", ["kind=gat", "policies.a=toy"])
    path = write_file("two.yaml", "stages: {eval: {kind: gat, policies: {a: toy}}}\n")
    with pytest.raises(ConfigError, match=f"stages.eval: {problem}"):
        load_pipeline(path, [])
    for kind, config in (("policies", EvalConfig), ("gatt", GattEvalConfig), (None, EvalConfig)):
        assert STAGES["eval"].of_kind(kind).config_class() is config
