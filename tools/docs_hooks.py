"""What mkdocs does while it builds the site: parts of pages that are made from the code (`hooks` in mkdocs.yml)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# mkdocs loads this file by its path, not as a module of the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prefect_htcdask.condor.diagnosis import Category
from tools.settings_reference import command_reference, settings_reference


def diagnosis_categories() -> str:
    """Every category of a diagnosis, with a link to its section: the strict build fails where one has none."""
    return " · ".join(f"[`{category.value}`](#{category.value})" for category in Category)


PARTS = {
    "<!-- settings reference -->": settings_reference,
    "<!-- command reference -->": command_reference,
    "<!-- diagnosis categories -->": diagnosis_categories,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in what the page asks for by a comment."""
    for mark, make in PARTS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown
