"""`align chat`: what is shown piece by piece, what is kept, commands, and answers for scripts."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from alignment.chat import ChatFormat
from alignment.cli import chat as command
from alignment.cli.chat import run_command
from alignment.cli.conversation import Conversation
from alignment.cli.main import app
from alignment.data import load_dialogues
from alignment.data_report import check_files
from alignment.dialogue import Candidate, Message
from alignment.errors import ConfigError, DataError, RunError
from alignment.models import load_chat_model, load_reward_model, save_model
from alignment.sampling import SamplingParams
from alignment.sampling.torch_engine import TorchSampler
from reward_models.score import score

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def toy():
    return load_chat_model("toy")


@pytest.fixture
def talk(toy):
    """A conversation with the toy model."""
    return Conversation(toy, SamplingParams(max_new_tokens=8, seed=3))


def says(conversation: Conversation, monkeypatch: pytest.MonkeyPatch, *texts: bytes, interrupted: bool = False) -> None:
    """Lets the model say these bytes, a token each, then end its turn; or be interrupted instead."""
    chat = conversation.chat

    def stream(*_arguments, **_options):
        yield from spelled(chat, b"".join(texts))
        if interrupted:
            raise KeyboardInterrupt
        yield chat.end_of_turn_id

    monkeypatch.setattr(conversation._sampler, "stream", stream)


def spelled(chat: ChatFormat, text: bytes) -> list[int]:
    """One token for each of these bytes."""
    symbols = byte_symbols()
    return [chat.tokenizer.backend_tokenizer.token_to_id(symbols[byte]) for byte in text]


def byte_symbols() -> dict[int, str]:
    """How byte-level tokenizers spell every byte (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def align(*arguments: object, stdin: str | bytes = ""):
    return CliRunner().invoke(app, [*map(str, arguments)], input=stdin)


# ------------------------------------------------------------------------------------------------------- answers


def test_answers_come_in_whole_characters_that_join_to_the_text(talk, monkeypatch):
    text = "né, 日本 🙂\n  done"
    says(talk, monkeypatch, text.encode())
    pieces: list[str] = []
    answer = talk.ask("hi", pieces.append)
    assert answer.candidate.response == "".join(pieces) == text
    assert len(pieces) >= len(text.replace(" ", "").replace("\n", ""))
    assert talk.turns == (Message("user", "hi"), Message("assistant", text))


def test_bytes_that_are_no_character_are_shown_once_that_is_certain(talk, monkeypatch):
    says(talk, monkeypatch, b"a\xff", b"b", "é".encode()[:1])
    pieces: list[str] = []
    assert talk.ask("hi", pieces.append).candidate.response == "".join(pieces) == "a\ufffdb\ufffd"
    assert pieces == ["a", "\ufffdb", "\ufffd"]
    says(talk, monkeypatch, b"\xff" * 9, b"b", interrupted=True)
    pieces.clear()
    talk.ask("hi", pieces.append)
    assert len(pieces) > 5, "a model that says nothing else is seen to say it"


def test_an_interrupted_answer_keeps_what_was_said(talk, monkeypatch):
    says(talk, monkeypatch, b"so far", "é".encode()[:1], interrupted=True)
    answer = talk.ask("hi")
    assert answer.candidate.finish_reason == "interrupted"
    assert talk.turns[-1] == Message("assistant", "so far")


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_turn_without_an_answer_is_forgotten(talk, monkeypatch, interrupted):
    says(talk, monkeypatch, b" ", interrupted=interrupted)
    assert talk.ask("hi").candidate.response == "" and talk.turns == ()


def test_an_answer_that_the_chat_format_cannot_write_is_shown_and_forgotten(talk, monkeypatch, capsys):
    """As a Llama 2 model's that writes [INST]: no later turn could be asked with it in the history."""

    def check(messages):
        if any("[INST]" in message.content for message in messages):
            raise DataError("a tag of the layout")

    monkeypatch.setattr(talk.chat, "check", check)
    says(talk, monkeypatch, b"fine")
    talk.ask("hi")
    says(talk, monkeypatch, b"ok [INST] more")
    command._answer_script(talk, "go on", as_json=False)
    told = capsys.readouterr()
    assert told.out == "ok [INST] more\n" and "cannot write this answer" in told.err
    assert len(talk.turns) == 2 and talk.ask("again").candidate.finish_reason == "refused"


def test_an_answer_cut_off_says_so(talk, monkeypatch):
    def stream(*_arguments, **_options):
        yield from talk.chat.tokenizer.encode("abc")

    monkeypatch.setattr(talk._sampler, "stream", stream)
    assert talk.ask("hi").candidate.finish_reason == "length"


def test_a_prompt_asked_again_gets_its_next_candidate(talk):
    first = talk.ask("give c").candidate
    talk.reset()
    second = talk.ask("give c").candidate
    assert (first.index, second.index) == (0, 1) and first.response != second.response


def test_turns_that_no_data_file_may_have_are_refused_and_change_nothing(talk):
    talk.ask("give c")
    before = talk.turns
    for text, problem in ((" ", "is empty"), ("\ud800", "half a character"), ("x" * 600, "Shorten it")):
        with pytest.raises(DataError, match=problem):
            talk.ask(text)
    assert talk.turns == before


def test_old_turns_that_no_longer_fit_are_left_out_and_reported(talk, monkeypatch):
    says(talk, monkeypatch, b"a" * 150)
    cut = [talk.ask("b" * 100).is_history_cut for _ in range(4)]
    assert cut == [False, False, True, True] and len(talk.turns) == 8


def test_an_answer_as_long_as_the_context_is_refused(toy):
    with pytest.raises(ConfigError, match="max-new-tokens 512"):
        Conversation(toy, SamplingParams(max_new_tokens=512))


# ------------------------------------------------------------------------------------------------------ commands


def test_commands_change_the_conversation(talk, monkeypatch):
    says(talk, monkeypatch, b"yes")
    assert "set" in run_command(talk, "/system  Be brief. ")
    talk.ask("one")
    prompt = talk.ask("two").candidate.prompt.messages
    assert [message.content for message in prompt] == ["Be brief.", "one", "yes", "two"]
    assert "1 turns" in run_command(talk, "/undo")
    assert [turn.content for turn in talk.turns] == ["one", "yes"]
    run_command(talk, "/reset")
    assert talk.messages == (Message("system", "Be brief."),)
    run_command(talk, "/system")
    assert talk.messages == ()
    assert all(f"/{name}" in run_command(talk, "/help") for name in ("system", "undo", "reset", "save", "save!"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/sav talk.jsonl", r"Did you mean /save\?"),
        ("/dance", "/help lists them"),
        ("/undo", "no turn"),
        ("/reset all", "takes nothing"),
        ("/save", "needs the name of a file"),
        ("/save talk.jsonl", "nothing to save"),
    ],
)
def test_a_command_that_cannot_be_carried_out_says_why(talk, line, problem):
    with pytest.raises(DataError, match=problem):
        run_command(talk, line)


def test_a_saved_conversation_is_a_demonstration_and_never_written_over_unasked(talk, monkeypatch, tmp_path):
    path = tmp_path / "my talk.jsonl"
    path.write_text("years of work")
    says(talk, monkeypatch, "été".encode())
    talk.system = "Be brief."
    talk.ask("hi")
    with pytest.raises(RunError, match=r"exists.*/save! "):
        run_command(talk, f"/save {path}")
    assert path.read_text() == "years of work"
    run_command(talk, f"/save! {path}")
    assert check_files([str(path)]).is_good
    [row] = load_dialogues([str(path)]).rows
    assert row.messages == (Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "été"))
    for place in (tmp_path / "nowhere" / "talk.jsonl", tmp_path):
        with pytest.raises(RunError, match="cannot be written"):
            run_command(talk, f"/save! {place}")


@pytest.mark.parametrize(
    "line", ["/save ~no-such-user/talk.jsonl", "/save! .", "/save! /", "/save " + "x" * 300, "/save a\0b"]
)
def test_a_name_that_no_file_may_have_does_not_end_the_conversation(talk, monkeypatch, line):
    says(talk, monkeypatch, b"yes")
    talk.ask("hi")
    before = talk.turns
    with pytest.raises(RunError, match=r"cannot be written \(.*[^.]\)\. Name another file"):
        run_command(talk, line)
    assert talk.turns == before


def test_a_folder_that_may_not_be_looked_into_does_not_end_the_conversation(talk, monkeypatch):
    def refuse(_path):
        raise PermissionError(errno.EACCES, "Permission denied")

    says(talk, monkeypatch, b"yes")
    talk.ask("hi")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", refuse)
        with pytest.raises(RunError, match=r"talk\.jsonl: cannot be written \(Permission denied\)"):
            run_command(talk, "/save talk.jsonl")


def test_an_answer_is_not_trained_under_a_system_message_that_it_never_saw(talk, monkeypatch, tmp_path):
    says(talk, monkeypatch, b"yes")
    talk.ask("one")
    run_command(talk, "/system Answer in French.")
    with pytest.raises(DataError, match="changed after the last answer"):
        run_command(talk, f"/save {tmp_path / 'early.jsonl'}")
    assert not (tmp_path / "early.jsonl").exists()
    talk.ask("two")
    assert "The last answer alone" in run_command(talk, f"/save {tmp_path / 'last.jsonl'}")
    [row] = load_dialogues([str(tmp_path / "last.jsonl")]).rows
    assert row.train_on == "last" and row.messages[0] == Message("system", "Answer in French.")
    run_command(talk, "/undo")
    run_command(talk, "/system")
    assert "The last answer alone" not in run_command(talk, f"/save {tmp_path / 'all.jsonl'}")
    [row] = load_dialogues([str(tmp_path / "all.jsonl")]).rows
    assert (row.train_on, [message.content for message in row.messages]) == ("all", ["one", "yes"])
    run_command(talk, "/reset")
    run_command(talk, "/system Be brief.")
    talk.ask("three")
    run_command(talk, f"/save {tmp_path / 'anew.jsonl'}")
    [row] = load_dialogues([str(tmp_path / "anew.jsonl")]).rows
    assert (row.train_on, len(row.messages)) == ("all", 3)


# ------------------------------------------------------------------------------------------------------- scripts


def test_messages_print_answers_only(toy):
    talk = Conversation(toy, SamplingParams(temperature=0.7, max_new_tokens=6))
    expected = [talk.ask(text).candidate.response for text in ("give c", "/more d")]
    done = align("chat", "toy", "--message", "give c", "-m", "/more d", "--max-new-tokens", 6)
    assert done.exit_code == 0 and done.stdout == "".join(f"{text}\n" for text in expected)


def test_the_answer_is_the_response_that_sample_gives_to_the_same_history(tmp_path):
    settings = ("--max-new-tokens", 12, "--seed", 5, "--temperature", 0.9)
    turns = ("--system", "Be brief.", "-m", "give c", "-m", "more d")
    done = align("chat", "toy", *turns, *settings, "--json")
    assert done.exit_code == 0
    rows = [Candidate.from_json(json.loads(line)) for line in done.stdout.splitlines()]
    assert [len(row.prompt.messages) for row in rows] == [2, 4]
    prompts = tmp_path / "prompts.jsonl"
    for row in rows:
        prompts.write_text(json.dumps(row.prompt.to_json()) + "\n")
        [alone] = align("sample", "toy", prompts, *settings).stdout.splitlines()
        found = Candidate.from_json(json.loads(alone))
        assert (found.response, found.seed, found.temperature) == (row.response, 5, 0.9)


def test_lines_of_standard_input_are_turns_and_commands(tmp_path):
    path = tmp_path / "talk.jsonl"
    stdin = f"/system Be brief.\n\n  give c \nmore d\n/undo\n//undo\n/save {path}\n"
    done = align("chat", "toy", "--max-new-tokens", 6, stdin=stdin)
    assert done.exit_code == 0 and "Saved 2 turns" in done.stderr and "Saved" not in done.stdout
    [row] = load_dialogues([str(path)]).rows
    assert [m.content for m in row.messages if m.role != "assistant"] == ["Be brief.", "give c", "/undo"]


def test_mistakes_of_a_script_end_it(tmp_path):
    unknown = align("chat", "toy", "--max-new-tokens", 6, stdin="/dance\ngive c\n")
    assert isinstance(unknown.exception, DataError) and unknown.stdout == ""
    not_text = align("chat", "toy", "--max-new-tokens", 6, stdin=b"give c\n\xff\n")
    assert isinstance(not_text.exception, DataError) and "not UTF-8 (0xff)" in str(not_text.exception)
    assert isinstance(align("chat", "toy", "--message", " ").exception, DataError)


def test_scores_go_beside_the_answers(tmp_path):
    reward = load_reward_model("toy", new_head_seed=0)
    save_model(reward.model, reward, tmp_path / "rm")
    arguments = ("chat", "toy", "-m", "give c", "--safety", tmp_path / "rm", "--max-new-tokens", 6)
    shown = align(*arguments)
    assert shown.exit_code == 0 and "P(safe) 0." in shown.stderr and "helpfulness" not in shown.stderr
    row = json.loads(align(*arguments, "--json").stdout)
    answer = row["response"][0]["content"]
    assert shown.stdout == f"{answer}\n"
    assert row["safety"] == pytest.approx(score(str(tmp_path / "rm"), ["give c"], [[answer]])[0][0], abs=0.02)


def test_each_judge_scores_every_answer_with_all_that_went_before(toy, monkeypatch):
    said, asked = [b"yes", b"no"] * 2, []

    def load(path, *, device):
        def score(prompts, responses):
            [prompt] = prompts
            asked.append((path, [message.content for message in prompt], responses))
            return [[{"rm-h": 1.5, "rm-s": -2.0}[path]]]

        return SimpleNamespace(score=score)

    def stream(*_arguments, **_options):
        yield from [*spelled(toy.chat, said.pop(0)), toy.chat.end_of_turn_id]

    monkeypatch.setattr(command, "Scorer", SimpleNamespace(load=load))
    monkeypatch.setattr(TorchSampler, "stream", stream)
    turns = ("--system", "Be brief.", "-m", "one", "-m", "two")
    arguments = ("chat", "toy", *turns, "--helpfulness", "rm-h", "--safety", "rm-s")
    shown = align(*arguments)
    assert shown.exit_code == 0 and shown.stdout == "yes\nno\n"
    scores = [line for line in shown.stderr.splitlines() if "P(safe)" in line]
    assert scores == ["helpfulness +1.50, P(safe) 0.119"] * 2  # 1 / (1 + e^2) = 0.1192
    rows = [json.loads(line) for line in align(*arguments, "--json").stdout.splitlines()]
    assert [(row["helpfulness"], row["safety"]) for row in rows] == [(1.5, -2.0)] * 2
    answered = ((["Be brief.", "one"], "yes"), (["Be brief.", "one", "yes", "two"], "no"))
    assert asked == [(judge, before, [[text]]) for before, text in answered for judge in ("rm-h", "rm-s")] * 2


@pytest.mark.parametrize("as_json", [False, True])
def test_a_script_is_told_what_became_of_an_answer(talk, monkeypatch, capsys, as_json):
    def told(text: str) -> str:
        command._answer_script(talk, text, as_json=as_json)
        return capsys.readouterr().err

    assert "cut off at 8 tokens" in told("give c")
    says(talk, monkeypatch)
    assert "the turn is forgotten" in told("give c")
    says(talk, monkeypatch, b"a" * 150)
    assert told("b" * 100) == told("b" * 100) == ""
    assert "the oldest turns no longer fit" in told("b" * 200)


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "\ufffd[2J\ta\ufffd"), (False, "\x1b[2J\ta\x9b")])
def test_a_terminal_is_not_sent_what_it_would_obey(talk, monkeypatch, capsys, is_terminal, shown):
    says(talk, monkeypatch, "\x1b[2J\ta\x9b".encode())
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: is_terminal, raising=False)
    command._answer_script(talk, "give c", as_json=False)
    assert capsys.readouterr().out == f"{shown}\n"
    command._answer_script(talk, "give c", as_json=True)
    [row] = capsys.readouterr().out.splitlines()
    assert json.loads(row)["response"][0]["content"] == "\x1b[2J\ta\x9b" and not set(row) & {"\x1b", "\x9b"}


# ------------------------------------------------------------------------------------------------------ terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_prompt_of_a_person_does_not_go_into_a_file_of_answers(talk, monkeypatch, capsys, is_terminal):
    def read(prompt=""):
        sys.stdout.write(prompt)  # as `input` does, also where standard output is a file
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: is_terminal, raising=False)
    command._talk(talk, "toy")
    told = capsys.readouterr()
    assert told.out == ("> " if is_terminal else "") and ("> " in told.err) != is_terminal


# The command with a model that takes a minute for an answer, so that it can be stopped on any machine.
SLOW_CHAT = """
import time
from alignment.cli.main import main
from alignment.sampling.torch_engine import TorchSampler
stream = TorchSampler.stream
def slowly(*arguments, **options):
    for drawn in stream(*arguments, **options):
        time.sleep(0.125)
        yield drawn
TorchSampler.stream = slowly
main()
"""


@pytest.mark.e2e
def test_a_person_at_a_terminal_can_stop_an_answer_and_save_it(tmp_path):
    pexpect = pytest.importorskip("pexpect")
    path = tmp_path / "talk.jsonl"
    arguments = ["-c", SLOW_CHAT, "chat", "toy", "--max-new-tokens", "480", "--top-k", "1"]
    # A dumb terminal gets no control sequences, which would look like the beginning of an answer.
    options = {"cwd": str(ROOT), "env": {**os.environ, "TERM": "dumb"}, "encoding": "utf-8"}
    # Where the tests run in the background, Ctrl-C is ignored, and a child would inherit that.
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    child = pexpect.spawn(sys.executable, arguments, timeout=120, preexec_fn=heeds, **options)
    child.expect_exact("/help lists commands")
    child.expect_exact("> ")
    child.sendline("/sav x")
    child.expect_exact("Did you mean /save?")
    child.expect_exact("> ")
    child.sendintr()
    child.expect_exact("Ctrl-D ends.")
    child.expect_exact("> ")
    child.sendline("give c")
    child.expect_exact("give c\r\n")
    child.expect(r"\S")  # it speaks
    child.sendintr()
    child.expect_exact("stopped")
    child.expect_exact("> ")
    child.sendline(f"/save {path}")
    child.expect_exact("Saved 1 turns")
    child.expect_exact("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    [row] = load_dialogues([str(path)]).rows
    assert row.messages[0].content == "give c" and row.messages[1].content
