"""A conversation with a chat model: its history, answers that come piece by piece, their scores, a file of it.

What is promised: the first answer to a prompt is the response that `align sample` gives to that history with the same
model, seed and sampling settings where it samples nothing else beside it (in a larger batch, bfloat16 may round to
another token). A prompt that is asked again, after an undo, gets what would be its next candidate there, so a
conversation is a function of its seed and of what is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.chat import ChatFormat, can_be_a_turn, decode_response, fit_prompt
from alignment.data import write_rows
from alignment.dialogue import Candidate, Dialogue, Message, Messages, Prompt, RowError, parse_messages
from alignment.errors import ConfigError, DataError, RunError
from alignment.model_folders import context_length
from alignment.models import LoadedModel
from alignment.sampling.protocol import SamplingParams
from alignment.sampling.torch_engine import TorchSampler
from reward_models.score import Scorer

INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Answer:
    """An answer with its prompt, and whether the model read that prompt without its oldest turns, which did not fit.

    `candidate.finish_reason` is "stop", "length", "interrupted", or "refused" (see `Conversation.ask`).
    """

    candidate: Candidate
    is_history_cut: bool


class Conversation:
    """Turns so far, and the model that answers the next one. `turns` alternate, a user's first, an assistant's last."""

    def __init__(
        self,
        loaded: LoadedModel,
        params: SamplingParams,
        *,
        system: str = "",
        judges: Mapping[str, Scorer] | None = None,
    ) -> None:
        """`judges` are reward models by what they judge: `helpfulness`, `safety`.

        Raises ConfigError where the answers' length leaves no room for a prompt in the model's context.
        """
        self.chat, self.params, self.system, self.judges = loaded.chat, params, system, dict(judges or {})
        self.turns: Messages = ()
        self._systems: list[str] = []  # the system message that each answer was given under
        self._sampler = TorchSampler(loaded.model, stop_ids=[loaded.chat.end_of_turn_id], max_rows=1)
        self._room = context_length(loaded.model.config) - params.max_new_tokens
        self._times_asked: Counter[tuple[int, ...]] = Counter()
        if self._room <= 0:
            raise ConfigError(
                f"--max-new-tokens {params.max_new_tokens} leaves no room for a prompt in the model's context. "
                "Lower it."
            )

    @property
    def messages(self) -> Messages:
        """The system message, where there is one, and the turns."""
        return (*([Message("system", self.system)] if self.system else []), *self.turns)

    def ask(self, text: str, show: Callable[[str], None] = lambda _piece: None) -> Answer:
        """The answer to one more user turn; `show` gets it piece by piece, in whole characters.

        KeyboardInterrupt ends the answer there. It is kept, as any other that has text; without text, or with text that
        the chat format cannot write (`finish_reason` is "refused"), the turn is forgotten: no dialogue can have it.

        Raises DataError where the turn does not fit into the context, is empty, or the chat format refuses it, and
        ModelError where the template does; the conversation is then as it was.
        """
        messages = _checked((*self.messages, Message("user", text)))
        ids, is_cut = fit_prompt(self.chat, messages, self._room)
        if ids is None:
            raise DataError(
                f"that is more than the {self._room} tokens that the model's context has room for. Shorten it."
            )
        asked = tuple(ids)
        index = self._times_asked[asked]
        self._times_asked[asked] += 1
        response, finish_reason = self._draw(ids, index, show)
        is_turn = can_be_a_turn(self.chat, response)
        if not is_turn and finish_reason != INTERRUPTED:
            finish_reason = "refused"
        if response and is_turn:
            self.turns = (*self.turns, Message("user", text), Message("assistant", response))
            self._systems.append(self.system)
        candidate = Candidate(
            prompt=Prompt(messages=messages),
            response=response,
            index=index,
            finish_reason=finish_reason,
            seed=self.params.seed,
            temperature=self.params.temperature,
        )
        return Answer(candidate, is_cut)

    def judge(self, answer: Answer) -> Answer:
        """The answer with the raw scores (logits) of the judges. Raises DataError where it is too long for one."""
        candidate = answer.candidate
        scores = {
            name: scorer.score([candidate.prompt.messages], [[candidate.response]])[0][0]
            for name, scorer in self.judges.items()
        }
        return replace(answer, candidate=replace(candidate, **scores))

    def undo(self) -> None:
        """Takes back the last user turn and its answer. Raises DataError where there is none."""
        if not self.turns:
            raise DataError("there is no turn to take back.")
        self.turns = self.turns[:-2]
        self._systems.pop()

    def reset(self) -> None:
        """Forgets all turns; the system message stays."""
        self.turns = ()
        self._systems.clear()

    def save(self, path: Path, *, overwrite: bool = False) -> Dialogue:
        """Writes the conversation as a demonstration, a row that `align sft` trains on; returns it.

        Its system message is the present one. Where earlier answers were given under another, the last answer alone is
        trained.

        Raises DataError where nothing was said, or nothing since the system message was changed, and RunError where the
        file exists or cannot be written.
        """
        if not self.turns:
            raise DataError("there is nothing to save yet.")
        if self._systems[-1] != self.system:
            raise DataError(
                "the system message was changed after the last answer, which has not seen it. Set it back with "
                "/system, or save after another answer."
            )
        train_on = "all" if set(self._systems) == {self.system} else "last"
        demonstration = Dialogue(messages=_checked(self.messages), train_on=train_on, source="chat")
        try:
            path = path.expanduser()
            is_taken = path.exists() and not overwrite
            if not is_taken:
                write_rows(path, [demonstration.to_json()])
        except (OSError, RuntimeError, ValueError) as error:  # a home that nobody has; a name that no file may have
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            raise RunError(f"{path}: cannot be written ({reason}). Name another file.") from error
        if is_taken:
            raise RunError(f"{path}: exists. Name another file; `/save! {path}` writes over it.")
        return demonstration

    def _draw(self, ids: Sequence[int], index: int, show: Callable[[str], None]) -> tuple[str, str]:
        """The text of a response and why it ended."""
        drawn: list[int] = []
        shown = ""
        try:
            with closing(self._sampler.stream(ids, self.params, index=index)) as tokens:
                for token in tokens:
                    drawn.append(token)
                    text = whole_characters(self.chat, drawn)
                    if len(text) > len(shown):
                        show(text[len(shown) :])
                        shown = text
        except KeyboardInterrupt:
            return shown.strip(), INTERRUPTED
        text = decode_response(self.chat, drawn)
        if len(text) > len(shown):
            show(text[len(shown) :])
        return text, "stop" if drawn[-1] == self.chat.end_of_turn_id else "length"


def whole_characters(chat: ChatFormat, ids: Sequence[int]) -> str:
    """The text of the first tokens of a response, without a last character of which bytes are still to come.

    Decoders write U+FFFD for them, one for up to three bytes or one for each.
    """
    text = decode_response(chat, ids)
    return text[: max(len(text.rstrip("\ufffd")), len(text) - 3)]


def _checked(messages: Messages) -> Messages:
    """Raises DataError where a dialogue has what no data file may have."""
    try:
        return parse_messages([message.to_json() for message in messages], "turns", last_role=messages[-1].role)
    except RowError as error:
        raise DataError(error.problem) from None
