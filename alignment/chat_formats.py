"""Chat formats: how a template's text and a message's text become token ids, for any Jinja template and for Llama 2."""

from __future__ import annotations

import datetime
import itertools
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

import jinja2
from transformers import PreTrainedTokenizerBase

from alignment.chat import ChatFormat, Segment
from alignment.dialogue import Message, Messages
from alignment.errors import DataError, ModelError, TemplateRefusal
from alignment.sources import find_template

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

# Private-use characters around an index stand for a message's text while the template is rendered.
_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")
# What reasoning models put behind the thoughts before an answer.
_END_OF_THOUGHT = "</think>"
# What templates that ask for the day, as Llama 3.2's, get on every day: the date that Llama 3.1's falls back to.
_A_DAY = datetime.date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
logger = logging.getLogger(__name__)


def chat_format(tokenizer: PreTrainedTokenizerBase, name: str = "auto") -> ChatFormat:
    """The format to use: `auto`, `llama2`, `chatml`, or the path of a Jinja template.

    `auto` takes the tokenizer's own template; one that writes Llama 2's tags gives the built-in format, whose ids
    follow Meta's reference. The chosen template is also set on the tokenizer, so that a saved model carries it.

    Raises ModelError where there is no template, or it cannot be split into turns.
    """
    if name == "llama2" or (name == "auto" and "<<SYS>>" in (tokenizer.chat_template or "")):
        return Llama2Format(tokenizer)
    if name == "chatml":
        if "<|im_end|>" not in tokenizer.get_vocab():
            raise ModelError(
                "the tokenizer has no <|im_end|>, which chatml ends a turn with. Set model.chat_template to a Jinja"
                " file that ends answers with one of its tokens: docs/troubleshooting.md, Tokenizer and template."
            )
        tokenizer.chat_template = CHATML
    elif name != "auto":
        try:
            tokenizer.chat_template = find_template(name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ModelError(f"{name}: not UTF-8 at byte {error.start}. Save the chat template as UTF-8.") from error
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template. Set model.chat_template to chatml (where it has <|im_end|>), llama2 or"
            " a Jinja file's path."
        )
    return JinjaFormat(tokenizer)


class JinjaFormat:
    """Any Jinja chat template that takes `messages` and `add_generation_prompt`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        # What the template writes depends on the roles alone, of which a data set has few sequences.
        self._pieces_by_roles: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
        self._ids_by_piece: dict[tuple[str, bool], list[int]] = {}
        probe = (Message("user", "u"), Message("assistant", "a"), Message("user", "v"), Message("assistant", "b"))
        self._lead = self._space_before_answers(probe)
        self._trimmed = self._trimmed_roles(probe)
        self._cuts_thoughts = self._leaves_out_thoughts(probe)
        self.closing = self._split_closing(self._pieces(probe[:2], generation=False)[-1])[0]
        if self._split_closing(self._pieces(probe, generation=False)[2])[0] != self.closing:
            raise ModelError(
                "the chat template ends an earlier assistant turn differently from the last one: a model would learn "
                "two ways to stop. Set model.chat_template to chatml or to another Jinja file."
            )
        self.end_of_turn_id = self.closing[-1]
        self._typed_control = self._typed_control_pattern(probe)
        if not self._equals_one_text():
            _warn_of_other_ids(tokenizer.get_chat_template())

    def check(self, messages: Sequence[Message]) -> None:
        """Raises DataError for an answer with thoughts that the template cuts off. Control tokens may be typed."""
        if self._cuts_thoughts and any(m.role == "assistant" and _END_OF_THOUGHT in m.content for m in messages):
            raise DataError(
                f"an assistant turn contains {_END_OF_THOUGHT}, and the chat template leaves out what is before it. "
                "Remove the thoughts, or set another model.chat_template."
            )

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """See ChatFormat. Raises DataError as `check` does."""
        self.check(messages)
        generation = messages[-1].role == "user"
        pieces = self._pieces(messages, generation=generation)
        segments = [Segment(self._encode_template(pieces[0], is_first=True))]
        for index, message in enumerate(messages):
            content, after = self._encode_text(self._written(message.role, message.content)), pieces[index + 1]
            if message.role == "assistant":
                closing, rest = self._split_closing(after)
                segments += [Segment(content + closing, turn=index), Segment(rest)]
            else:
                segments += [Segment(content), Segment(self._encode_template(after))]
        return segments

    def encode_response(self, text: str) -> list[int]:
        """See ChatFormat."""
        return self._encode_text(self._written("assistant", text)) + self.closing

    def _written(self, role: str, text: str) -> str:
        """A message's text as the template writes it."""
        text = text.strip() if role in self._trimmed else text
        return f"{self._lead}{text}" if role == "assistant" else text

    def _pieces(self, messages: Sequence[Message], *, generation: bool) -> list[str]:
        """The template's own text before, between and after the messages' texts."""
        key = (generation, tuple(message.role for message in messages))
        if key not in self._pieces_by_roles:
            pieces = self._render_pieces(messages, generation=generation)
            for index, message in enumerate(messages):
                if message.role == "assistant":
                    pieces[index] = pieces[index].removesuffix(self._lead)
            self._pieces_by_roles[key] = pieces
        return self._pieces_by_roles[key]

    def _render_pieces(
        self, messages: Sequence[Message], *, generation: bool, around: tuple[int, str, str] | None = None
    ) -> list[str]:
        """With marks for the texts; `around` is the index of one, and what stands before and behind its mark."""
        marked = [{"role": m.role, "content": _MARK.format(index)} for index, m in enumerate(messages)]
        if around is not None:
            index, before, behind = around
            marked[index]["content"] = f"{before}{marked[index]['content']}{behind}"
        try:
            template = _on_one_day(self.tokenizer.get_chat_template())
            text = self.tokenizer.apply_chat_template(
                marked, chat_template=template, tokenize=False, add_generation_prompt=generation
            )
        except jinja2.TemplateSyntaxError as error:
            problem = f"the chat template is no valid Jinja (line {error.lineno}: {error.message})."
            raise ModelError(f"{problem} Mend it, or set model.chat_template to another.") from error
        except Exception as error:  # a template computes, and can fail in any way
            raise TemplateRefusal(f"the chat template refuses this dialogue: {error}") from error
        *parts, last = _MARKS.split(text)
        pieces, order = parts[0::2], [int(index) for index in parts[1::2]]
        if order != list(range(len(messages))):
            missing = [m.role for i, m in enumerate(messages) if i not in order]
            what = f"leaves out the {missing[0]} turn" if missing else "changes the order of the turns"
            raise TemplateRefusal(f"the chat template {what}. Use another model.chat_template, or remove that turn.")
        return [*pieces, last]

    def _space_before_answers(self, probe: Messages) -> str:
        """What a template writes before an answer and not at a prompt's end: nothing, or space, as Mistral's.

        It belongs to the answer then. Raises ModelError where a prompt is no prefix of the dialogue that goes on from
        it.
        """
        whole = self._render_pieces(probe, generation=False)
        leads = set()
        for turns in (1, 3):
            *before, last = self._render_pieces(probe[:turns], generation=True)
            lead = whole[turns].removeprefix(last)
            fits = whole[:turns] == before and whole[turns] == last + lead and not lead.strip()
            leads.add(lead if fits else None)
        if None in leads or len(leads) > 1:
            raise ModelError(
                "the chat template writes earlier turns differently once later turns follow, so what is trained "
                "would not match what is sampled. Set model.chat_template to chatml or to another Jinja file."
            )
        return leads.pop()

    def _trimmed_roles(self, probe: Messages) -> set[str]:
        """The roles whose texts the template strips of the space around them, as Llama 3's and Gemma's do."""
        kept: set[str] = set()
        seen: set[str] = set()
        for messages in (probe, (Message("system", "s"), *probe)):
            with suppress(TemplateRefusal):  # some templates know no system turn
                plain = self._render_pieces(messages, generation=False)
                for index, message in enumerate(messages):
                    spaced = self._render_pieces(messages, generation=False, around=(index, " \n", "\n "))
                    seen.add(message.role)
                    if spaced != plain:
                        kept.add(message.role)
        return seen - kept

    def _leaves_out_thoughts(self, probe: Messages) -> bool:
        """Whether the template leaves out what an answer, an earlier one or the last, says before its thoughts end."""
        plain, thought = self._render_pieces(probe, generation=False), f"thought{_END_OF_THOUGHT}"
        return any(
            self._render_pieces(probe, generation=False, around=(index, thought, "")) == plain for index in (1, 3)
        )

    def _split_closing(self, piece: str) -> tuple[list[int], list[int]]:
        """The ids that end an assistant turn (through its first control token), and the ids after them."""
        ids = self._encode_template(piece)
        for index, token in enumerate(ids):
            if token in self._special:
                return ids[: index + 1], ids[index + 1 :]
        raise ModelError(
            f"the chat template ends an assistant turn with {piece!r}, which has no control token: the model could "
            "not learn to stop. Add the end-of-sequence token to the template."
        )

    def _encode_template(self, text: str, *, is_first: bool = False) -> list[int]:
        """Ids of the template's own text, at the beginning of a dialogue or further on."""
        if (text, is_first) not in self._ids_by_piece:
            if is_first:
                ids = self.tokenizer.encode(text, add_special_tokens=False) if text else []
            else:
                ids = _encode_inside(self.tokenizer, text)
            self._ids_by_piece[text, is_first] = ids
        return self._ids_by_piece[text, is_first]

    def _encode_text(self, text: str) -> list[int]:
        """Ids of a message's text: control tokens as plain text, those that are not special by a cut through them."""
        if self._typed_control is None:
            return _encode_inside(self.tokenizer, text, split_special_tokens=True)
        cuts = [0, *(found.start() + 1 for found in self._typed_control.finditer(text)), len(text)]
        parts = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
        return [token for part in parts for token in _encode_inside(self.tokenizer, part, split_special_tokens=True)]

    def _equals_one_text(self) -> bool:
        """Whether an ordinary dialogue has the ids of its text tokenized at once, as other programs do."""
        texts = ("the first question?", "the first answer.", "the second question?", "the second answer.")
        messages = tuple(Message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts))
        first, *after = self._pieces(messages, generation=False)
        written = [self._written(message.role, message.content) for message in messages]
        whole = first + "".join(text + piece for text, piece in zip(written, after, strict=True))
        ids = [token for segment in self.segments(messages) for token in segment.ids]
        return ids == self.tokenizer.encode(whole, add_special_tokens=False)

    def _typed_control_pattern(self, probe: Messages) -> re.Pattern[str] | None:
        """Matches the template's own tokens that tokenizers know as added but not as special.

        `split_special_tokens` takes special ones apart when they are typed, not these. Whitespace is no control.
        """
        added = {token: str(known) for token, known in self.tokenizer.added_tokens_decoder.items() if not known.special}
        pieces = list(self._pieces(probe, generation=True))
        with suppress(TemplateRefusal):  # some templates know no system turn
            pieces += self._pieces((Message("system", "s"), *probe), generation=True)
        written = {token for piece in pieces for token in self._encode_template(piece)}
        names = [added[token] for token in written & added.keys() if len(added[token].strip()) > 1]
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


class Llama2Format:
    """Llama 2-Chat's layout, with the ids of Meta's reference implementation.

    Every exchange is `<s>[INST] user [/INST] answer </s>`; system text stands inside the first user turn between
    `<<SYS>>` tags. Texts that hold a tag are refused, as the reference does. The space before `</s>` belongs to the end
    of turn: the reference puts it there in every finished exchange, so a model that is to reach `</s>` learns it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise ModelError("model.chat_template: llama2 needs a tokenizer with BOS and EOS tokens.")
        self.tokenizer = tokenizer
        self.tokenizer.chat_template = LLAMA2_JINJA
        self.end_of_turn_id = tokenizer.eos_token_id
        self.closing = [*self._encode("[/INST] a ")[len(self._encode("[/INST] a")) :], self.end_of_turn_id]

    def check(self, messages: Sequence[Message]) -> None:
        """Raises DataError where a text holds one of the layout's tags."""
        for message in messages:
            if tag := next((tag for tag in LLAMA2_TAGS if tag in message.content), None):
                raise DataError(f"a {message.role} turn contains {tag}, a tag of the Llama 2 layout. Remove it.")

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """See ChatFormat. Raises DataError where a text holds one of the layout's tags."""
        self.check(messages)
        turns = [message.content.strip() for message in messages]
        offset = 0
        if messages[0].role == "system":
            turns[1] = f"<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n{messages[1].content}".strip()
            offset = 1
        segments = []
        for index in range(offset, len(messages), 2):
            segments.append(Segment([self.tokenizer.bos_token_id, *self._encode(f"[INST] {turns[index]} [/INST]")]))
            if index + 1 < len(messages):
                segments.append(Segment(self.encode_response(turns[index + 1]), turn=index + 1))
        return segments

    def encode_response(self, text: str) -> list[int]:
        """See ChatFormat."""
        anchor = self._encode("[/INST]")
        return [*self._encode(f"[/INST] {text.strip()} ")[len(anchor) :], self.tokenizer.eos_token_id]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


# The same layout for tools that read a saved tokenizer (transformers, vLLM).
LLAMA2_JINJA = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{% set content = system + message['content'] if loop.first else message['content'] %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def _encode_inside(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    """Ids of text in the middle of a dialogue: no space put before it.

    SentencePiece tokenizers write a space before whatever they are given; an anchor in front takes it, and its own
    ids are cut off again.
    """
    if not text:
        return []
    anchor = tokenizer.encode("\n", add_special_tokens=False)
    if len(anchor) > 1:
        ids = tokenizer.encode("\n" + text, add_special_tokens=False, **options)
        if ids[: len(anchor)] == anchor:
            return ids[len(anchor) :]
    return tokenizer.encode(text, add_special_tokens=False, **options)


def _on_one_day(template: str) -> str:
    """The template with a date in the place of today's: the ids of a dialogue must not depend on the day."""
    return _TODAY.sub(lambda call: f"{call[1]}{_A_DAY.strftime(call[2])}{call[1]}", template)


@lru_cache  # formats are made again and again in a run
def _warn_of_other_ids(template: str) -> None:
    """Says once of a template that others read it otherwise."""
    logger.warning(
        "the chat template joins its text with that of messages, so that programs which tokenize a whole dialogue at "
        "once (transformers, servers) read other ids than are trained and sampled here. In a template of your own, put "
        "a control token or a line break before and behind every message."
    )
