"""Does an answer follow an instruction? One pure function for each kind that a program can judge.

Words are compared without case, quotes and punctuation around them, so that "Over and out!" ends with "over and out",
and both kinds of apostrophe are one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

Checker = Callable[[str, str], bool]

LANGUAGE_CODES = {
    "Dutch": "nl",
    "English": "en",
    "French": "fr",
    "German": "de",
    "Italian": "it",
    "Latin": "la",
    "Portuguese": "pt",
    "Spanish": "es",
    "Swedish": "sv",
}
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_PART = re.compile(r"[^\W_]+")
# Scripts that write words without blanks between: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_BULLET = re.compile(r"^[ \t]*[-*•][ \t]+\S", re.MULTILINE)


def is_in_capitals(answer: str, _value: str = "") -> bool:
    """Has upper-case letters and none in lower case."""
    return any(character.isupper() for character in answer) and not any(character.islower() for character in answer)


def ends_with(answer: str, phrase: str) -> bool:
    """The last words are those of the phrase."""
    wanted = _words(phrase)
    return _words(answer)[-len(wanted) :] == wanted


def starts_with(answer: str, phrase: str) -> bool:
    """The first words are those of the phrase."""
    wanted = _words(phrase)
    return _words(answer)[: len(wanted)] == wanted


def has_keyword(answer: str, phrase: str) -> bool:
    """The phrase's words occur, side by side."""
    return _holds(_words(answer), _words(phrase))


def lacks_word(answer: str, phrase: str) -> bool:
    """There are words, and the phrase's do not occur side by side, nor as parts of joined ones: "you're" has "you"."""
    words = _words(answer)
    return bool(words) and not has_keyword(answer, phrase) and not _holds(_parts(words), _parts(_words(phrase)))


def has_at_most_words(answer: str, count: str) -> bool:
    """At least one word and at most `count`, as separated by white space."""
    return 0 < len(answer.split()) <= int(count)


def has_bullet_points(answer: str, count: str) -> bool:
    """Exactly `count` lines begin with `-`, `*` or `•` and a space."""
    return len(_BULLET.findall(answer)) == int(count)


def is_in_language(answer: str, language: str) -> bool:
    """py3langid (after Lui and Baldwin 2012) gives it at least half of the probability, among `LANGUAGE_CODES`."""
    language_code, _ = _language_identifier().classify(answer)
    return language_code == LANGUAGE_CODES[language]


CHECKERS: Mapping[str, Checker] = {
    "capitals": is_in_capitals,
    "ending": ends_with,
    "opening": starts_with,
    "keyword": has_keyword,
    "forbidden_word": lacks_word,
    "max_words": has_at_most_words,
    "bullet_points": has_bullet_points,
    "language": is_in_language,
}

# Kinds that an answer may keep only because it was cut off.
HELPED_BY_A_CUT = frozenset({"forbidden_word", "max_words", "bullet_points"})
# Kinds that an answer may break only because it was cut off.
HURT_BY_A_CUT = frozenset({"ending", "keyword", "bullet_points"})


def value_problem(kind: str, value: str) -> str | None:
    """Why `value` is none for instructions of `kind`, or None where it is one."""
    if kind == "language" and value not in LANGUAGE_CODES:
        return f"{value!r} is no language that can be told from others here. Use one of {', '.join(LANGUAGE_CODES)}."
    if kind in ("max_words", "bullet_points") and not (value.isdecimal() and int(value) > 0):
        return f"{value!r} is no number of {'words' if kind == 'max_words' else 'bullet points'}. Give 1 or more."
    if kind in ("hobby", "figure", "ending", "opening", "keyword", "forbidden_word") and not _words(value):
        return f"{value!r} has no word in it."
    if kind in ("ending", "opening", "keyword", "forbidden_word") and _UNSPACED.search(value):
        return f"{value!r} is written without blanks between its words, which no program here tells apart."
    return None


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold().replace("’", "'"))


def _parts(words: Sequence[str]) -> list[str]:
    return [part for word in words for part in _PART.findall(word)]


def _holds(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether `wanted` occurs in `words`, side by side."""
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words) - len(wanted) + 1))


@lru_cache(maxsize=1)
def _language_identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=0.5)
    identifier.set_languages(LANGUAGE_CODES.values())
    return identifier
