"""Code that stays in a chapter, for its tests."""

from pathlib import Path

import nbformat

CHAPTERS = Path(__file__).resolve().parents[1] / "chapters"


def from_chapter(pattern: str, beginning: str, names: dict) -> dict:
    """Run a chapter's cell that holds `beginning`, with `names`; return its names."""
    (path,) = CHAPTERS.glob(pattern)
    (cell,) = (
        cell.source
        for cell in nbformat.read(path, 4).cells
        if cell.cell_type == "code" and f"\n{beginning}" in f"\n{cell.source}"
    )
    space = {"__name__": "chapter", **names}
    exec(compile(cell, path.name, "exec"), space)
    return space
