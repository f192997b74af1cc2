"""Makes pages of the site from the Markdown that lies beside the code: README.md is its front page.

A link to another page is turned to where the page is on the site; one to a file that is no page (a script, a folder)
keeps its text alone. Links that point to nothing are left as they are, for the strict build to complain about.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
FRONT = "README.md"
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "benchmarks/**/*.md", "examples/**/*.md")
LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s#]*)(#[^)\s]*)?\)")
REFERENCE = re.compile(r"^[a-z]+:|^$")
"""Addresses elsewhere, and links within a page."""


def pages_beside() -> dict[str, str]:
    """Path in the repository of each page that is not under docs/, to its path on the site."""
    found = {path.relative_to(ROOT).as_posix() for pattern in BESIDE for path in ROOT.glob(pattern)}
    return {FRONT: "index.md", **{path: _on_site(path) for path in sorted(found)}}


def _on_site(path: str) -> str:
    if path == "LICENSE":
        return "license.md"
    return path.lower() if "/" not in path else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File  # here, so that the suite needs no mkdocs

    for source, page in pages_beside().items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=_fenced(text) if source == "LICENSE" else text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    site = pages_beside()
    source = next((path for path, at in site.items() if at == page.file.src_uri), f"docs/{page.file.src_uri}")
    return relinked(markdown, source, site)


def relinked(markdown: str, source: str, site: dict[str, str]) -> str:
    """`markdown` of the file `source` of the repository, its links turned to pages of the site."""
    here = posixpath.dirname(site.get(source, source.removeprefix("docs/")))

    def turned(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if REFERENCE.match(target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in site or path.startswith("docs/"):
            at = site.get(path, path.removeprefix("docs/"))
            named = f"[{_title(path)}]" if text.strip("[]`") == target else text
            return f"{named}({posixpath.relpath(at, here or '.')}{anchor})"
        return text[1:-1] if (ROOT / path).exists() else match[0]

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(turned, part) for part in parts)


def _title(path: str) -> str:
    """What a page is called: a path says nothing on a site."""
    heading = (
        re.search(r"^# (.+)$", (ROOT / path).read_text(), re.MULTILINE) if (ROOT / path).exists() else None
    )
    return heading[1] if heading else posixpath.basename(path).removesuffix(".md").capitalize()


def _fenced(text: str) -> str:
    return f"# Licence\n\n```text\n{text.rstrip()}\n```\n"
