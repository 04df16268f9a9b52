"""The code blocks of the README and the documents, with what a comment above each says of its test."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]

_DIRECTIVE = re.compile(r"<!-- test: (?P<what>.*?) -->", re.DOTALL)
_NOT_RUN = "not run: "


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        page: the file that it stands in.
        line: of its fence, from 1.
        language: what the fence says it is.
        title: the file that it is meant to be in, or empty.
        code: its text.
        prints: what it prints, among other things; `None` where that is not said.
        not_run: why it cannot be run here; empty where it is.
        gateway: whether it is configuration of a Dask Gateway.
    """

    page: Path
    line: int
    language: str
    title: str
    code: str
    prints: str | None
    not_run: str
    gateway: bool

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page in their order.

    Raises:
        ValueError: a block is indented and not fenced, has no language, or stands below a comment that means nothing.
    """
    found = []
    comment = ""
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "code_block":
            raise ValueError(f"{page.name}:{line}: fence the block and name its language")
        if token.type == "html_block":
            comment = token.content
            continue
        if token.type == "fence":
            found.append(_block(page, line, token.info, token.content, comment))
        comment = ""
    return found


def _block(page: Path, line: int, info: str, code: str, comment: str) -> Block:
    language, _, rest = info.partition(" ")
    if not language:
        raise ValueError(f"{page.name}:{line}: the block has no language")
    title = re.search(r'title="([^"]+)"', rest)
    said = _DIRECTIVE.search(comment)
    what = " ".join(said["what"].split()) if said else ""
    if what and not (what.startswith(("prints ", _NOT_RUN)) or what == "gateway configuration"):
        raise ValueError(f"{page.name}:{line}: test: {what!r} means nothing")
    return Block(
        page=page,
        line=line,
        language=language,
        title=title[1] if title else "",
        code=code,
        prints=what.removeprefix("prints ") if what.startswith("prints ") else None,
        not_run=what.removeprefix(_NOT_RUN) if what.startswith(_NOT_RUN) else "",
        gateway=what == "gateway configuration",
    )


ALL = [block for page in PAGES for block in blocks_of(page)]
