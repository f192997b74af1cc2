"""Commands of the Markdown that a newcomer reads: fenced blocks of `sh`, in the order of the page.

A block that cannot run everywhere is marked on the line before it: `<!-- needs: gpu -->`; `NEEDS` has the words.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {
    "gpu": "an NVIDIA GPU",
    "hours": "more time than a test has",
    "vllm": "vLLM in an environment of its own",
    "network": "a model or data set from the Hugging Face hub",
    "root": "root, for namespaces and control groups",
}
_FENCE = re.compile(r"^(?P<mark><!-- needs: (?P<needs>.*?) -->\n)?```(?P<language>\w*).*\n", re.MULTILINE)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}.*\n)+", re.MULTILINE)
_ENDS = {
    ";",
    "|",
    "||",
    "&&",
    "&",
    ">",
    ">>",
    "<",
    "2>",
    "do",
    "done",
    "until",
    "while",
    "then",
    "if",
    "[",
    "(",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, what it needs beyond a plain machine, and its text."""

    page: Path
    line: int
    language: str
    needs: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """README first, since it makes the environment."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    return found + sorted((ROOT / "examples").rglob("*.md"))


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    position = 0
    while match := _FENCE.search(text, position):
        end = text.index("\n```", match.end() - 1)
        line = text.count("\n", 0, match.end())
        yield Block(page, line, match["language"], match["needs"], text[match.end() : end + 1])
        position = end + len("\n```")


def indented(page: Path) -> list[str]:
    """Blocks of four spaces, in which a command would not be seen."""
    return _INDENTED.findall(_FENCED.sub("", page.read_text()))


def spans(page: Path) -> list[str]:
    """Code within sentences."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _FENCED.sub("", page.read_text()))]


def invocations(script: str) -> list[list[str]]:
    """Simple commands of a piece of shell, as words, without redirections and what is around them."""
    found: list[list[str]] = []
    for line in script.replace("\\\n", " ").splitlines():
        command: list[str] = []
        for word in _words(line):
            if word in _ENDS:
                found.append(command)
                command = []
            else:
                command.append(word)
        found.append(command)
    return [command for command in found if command]


def _words(line: str) -> Iterator[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>()")
    lexer.commenters = "#"
    lexer.whitespace_split = True
    return iter(lexer)
