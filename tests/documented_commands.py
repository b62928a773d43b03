"""The commands that README and docs name, as words: of code blocks, running text and tables."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "notebooks" / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
PROGRAMS = {
    "accelerate", "align", "cd", "cp", "export", "git", "make", "pip", "printf", "pytest", "python", "source",
    "torchrun",
}  # fmt: skip
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Command:
    """A program with its arguments; `is_block` where it stands in a code block, to be copied as it is."""

    words: tuple[str, ...]
    page: str
    is_block: bool

    @property
    def program(self) -> str:
        """Its first word."""
        return self.words[0]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def block_lines(text: str) -> Iterator[str]:
    """Lines of code blocks that open with a program, joined where a backslash breaks them."""
    joined = re.sub(r"\\\n\s*", "", text)
    fenced = re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", joined, re.M | re.S)
    indented = re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```", "", joined, flags=re.M | re.S), re.M)
    for line in [*"\n".join(fenced).splitlines(), *indented]:
        words = [word for word in line.split() if not _ASSIGNMENT.match(word)]
        if words and words[0] in PROGRAMS:
            yield line


def inline_spans(text: str) -> Iterator[str]:
    """Code in running text and tables that opens with a program and goes on."""
    without_blocks = re.sub(r"^    .*$", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    for span in re.findall(r"(?<!`)`((?:[^`\n]|\n(?!\n))+)`(?!`)", without_blocks):
        words = [word for word in span.split() if not _ASSIGNMENT.match(word)]
        if len(words) > 1 and words[0] in PROGRAMS:
            yield " ".join(span.split())


def simple_commands(line: str) -> Iterator[tuple[str, ...]]:
    """The commands of a line, without comments, assignments before them, pipes and `&&`."""
    line = re.sub(r"<[^<>]*>", "PLACEHOLDER", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word[:1] in ("|", "&", ";"):
            if words:
                yield tuple(words)
            words = []
        elif words or not _ASSIGNMENT.match(word):
            words.append(word)


def documented_commands() -> list[Command]:
    """All of them, each once."""
    found: dict[tuple[str, ...], Command] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for lines, is_block in ((block_lines(text), True), (inline_spans(text), False)):
            for line in lines:
                for words in simple_commands(line):
                    found.setdefault(words, Command(words, str(page.relative_to(ROOT)), is_block))
    return list(found.values())


def parse_as_script(arguments: Sequence[str]) -> None:
    """A script and a list of its arguments, in JSON: its own parser reads each; nothing else in it is run."""
    script, commands = arguments
    sys.path.insert(0, str(Path(script).resolve().parent))
    parse = runpy.run_path(script)["_arguments"]
    for words in json.loads(commands):
        sys.argv = [script, *words]
        parse()
