"""`align chat`: a conversation in a terminal, or answers for a script.

Answers go to standard output, everything else to standard error. In a terminal a mistake is shown and the conversation
goes on; in a script it ends the command.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState

from alignment.cli.conversation import INTERRUPTED, Answer, Conversation
from alignment.config import SamplingSection, build_section
from alignment.errors import AlignError, DataError
from alignment.hardware import compute_dtype
from alignment.models import load_chat_model
from alignment.progress import console
from alignment.sampling.prompts import sampling_params
from reward_models.calibration import sigmoid
from reward_models.score import Scorer

COMMANDS = {
    "/help": "show this",
    "/system TEXT": "set the system message; without TEXT, remove it",
    "/undo": "take back the last turn and its answer",
    "/reset": "forget all turns; the system message stays",
    "/save FILE": "write the conversation as a demonstration (JSON lines)",
    "/save! FILE": "the same, over a file that exists",
}
# What a terminal obeys: a model may write it, and it is not to be carried out. A pipe gets the answer as it is.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def chat(
    model: str,
    settings: Mapping[str, Any],
    *,
    messages: Sequence[str] = (),
    as_json: bool = False,
    helpfulness: str | None = None,
    safety: str | None = None,
    system: str = "",
    seed: int = 0,
) -> None:
    """Answers `messages`; without any the lines of standard input, which is a person where it is a terminal."""
    params = sampling_params(build_section(SamplingSection, settings), seed)
    device = PartialState().device
    loaded = load_chat_model(model, dtype=compute_dtype(device), keep_adapter=True)
    loaded.model.to(device)
    paths = {"helpfulness": helpfulness, "safety": safety}
    judges = {name: Scorer.load(path, device=device) for name, path in paths.items() if path}
    conversation = Conversation(loaded, params, system=system, judges=judges)
    if messages:
        for text in messages:
            _answer_script(conversation, text, as_json=as_json)
    elif sys.stdin.isatty() and not as_json:
        _talk(conversation, model)
    else:
        _read_script(conversation, sys.stdin, as_json=as_json)


def run_command(conversation: Conversation, line: str) -> str:
    """Carries out a line that begins with `/`; returns what to say about it. Raises AlignError where it cannot."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    takes = {command.partition(" ")[0]: command.partition(" ")[2] for command in COMMANDS}
    if name not in takes:
        guess = difflib.get_close_matches(name, takes, n=1)
        hint = f"Did you mean {guess[0]}?" if guess else "/help lists them."
        raise DataError(f"{name} is no command. {hint} A text that begins with / is sent as /{line}")
    if rest and not takes[name]:
        raise DataError(f"{name} takes nothing behind it, found {rest!r}.")
    if name == "/help":
        return _help()
    if name == "/system":
        conversation.system = rest
        return "The system message is set." if rest else "There is no system message now."
    if name == "/undo":
        conversation.undo()
        return f"Taken back. {len(conversation.turns) // 2} turns are left."
    if name == "/reset":
        conversation.reset()
        return "All turns are forgotten."
    if not rest:
        raise DataError(f"{name} needs the name of a file, e.g. {name} talk.jsonl")
    saved = conversation.save(Path(rest), overwrite=name == "/save!")
    told = f"Saved {len(conversation.turns) // 2} turns to {rest}."
    if saved.train_on == "last":
        told += " The last answer alone will be trained: earlier ones had another system message."
    return told


def _talk(conversation: Conversation, model: str) -> None:
    """A person at a terminal."""
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and earlier lines in `input`)
    _note(f"{model}. /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.")
    while True:
        try:
            line = _read_line().strip()
            if not line:
                continue
            if _is_command(line):
                _note(run_command(conversation, line))
            else:
                _answer_person(conversation, _plain(line))
        except EOFError:
            _note("")
            return
        except KeyboardInterrupt:
            _note("\nCtrl-D ends.")
        except UnicodeDecodeError as error:
            _note(str(_not_utf8(error)), style="red")
        except AlignError as error:
            _note(str(error), style="red")


def _read_line() -> str:
    """What a person types next. The prompt goes where it is seen: not into a file that is to have the answers."""
    if sys.stdout.isatty():
        return input("> ")
    sys.stderr.write("> ")
    sys.stderr.flush()
    return input()


def _answer_person(conversation: Conversation, text: str) -> None:
    answer = conversation.ask(text, _show)
    _write("\n")
    _remark(conversation, answer)


def _read_script(conversation: Conversation, lines: Iterable[str], *, as_json: bool) -> None:
    """Every line is a turn or a command; empty ones are left out."""
    for line in _stripped(lines):
        if _is_command(line):
            _note(run_command(conversation, line))
        else:
            _answer_script(conversation, _plain(line), as_json=as_json)


def _answer_script(conversation: Conversation, text: str, *, as_json: bool) -> None:
    answer = conversation.ask(text) if as_json else conversation.ask(text, _show)
    if answer.candidate.finish_reason == INTERRUPTED:
        raise KeyboardInterrupt
    if as_json:
        answer = conversation.judge(answer)
        row = json.dumps(answer.candidate.to_json(), ensure_ascii=False)
        _write(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", row) + "\n")
    else:
        _write("\n")
    _remark(conversation, answer, with_scores=not as_json)


def _remark(conversation: Conversation, answer: Answer, *, with_scores: bool = True) -> None:
    """Says what is to be known of an answer, its scores last; nothing where there is nothing to say."""
    candidate = answer.candidate
    notes = {
        "length": f"cut off at {conversation.params.max_new_tokens} tokens (--max-new-tokens)",
        INTERRUPTED: "stopped",
        "refused": "the chat format cannot write this answer, which holds one of its tags, so the turn is forgotten",
    }
    remarks = [notes[candidate.finish_reason]] if candidate.finish_reason in notes else []
    if not candidate.response:
        remarks.append("an empty answer, so the turn is forgotten")
    if answer.is_history_cut:
        remarks.append("the oldest turns no longer fit and were not read")
    if with_scores and candidate.response and conversation.judges:
        remarks.append(_scores(conversation.judge(answer)))
    if remarks:
        _note("; ".join(remarks))


def _scores(answer: Answer) -> str:
    found = answer.candidate
    parts = [] if found.helpfulness is None else [f"helpfulness {found.helpfulness:+.2f}"]
    return ", ".join(parts if found.safety is None else [*parts, f"P(safe) {sigmoid(found.safety):.3f}"])


def _is_command(line: str) -> bool:
    return line.startswith("/") and not line.startswith("//")


def _plain(line: str) -> str:
    """A line that is no command; two slashes at its beginning stand for one."""
    return line.removeprefix("/") if line.startswith("//") else line


def _stripped(lines: Iterable[str]) -> Iterator[str]:
    try:
        for line in lines:
            if line := line.strip():
                yield line
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from error


def _not_utf8(error: UnicodeDecodeError) -> DataError:
    return DataError(f"standard input: not UTF-8 ({error.object[error.start]:#04x}). Convert it.")


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(f"{name:<{width}}  {meaning}" for name, meaning in COMMANDS.items())


def _show(piece: str) -> None:
    """A piece of an answer."""
    _write(_CONTROL.sub("\ufffd", piece) if sys.stdout.isatty() else piece)


def _write(text: str) -> None:
    """To standard output at once, since a person or a pipe waits for it."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str, style: str = "dim") -> None:
    console.print(text, style=style, soft_wrap=True)
