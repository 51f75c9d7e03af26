"""Running a chapter again changes nothing but times: executed twice, it prints and
draws the same.
"""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
# one that draws and trains, and one that plots; they take least of their kind
SAMPLE = ["[0-9]*_attention", "[0-9]*_loss"]


def outputs(path):
    """Everything that the chapter shows, cell by cell, without what takes time."""
    notebook = nbformat.read(path, 4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = output.get("text", "") + str(data.get("text/plain", ""))
            timed = re.search(r"\d ?(s|ms|us|seconds|tokens/s)\b", text)
            yield ("" if timed else text), data.get("image/png", "")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", SAMPLE)
def test_running_again_changes_nothing(pattern, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), "."]))
    (path,) = (ROOT / "chapters").glob(f"{pattern}.ipynb")
    # one piece of text may arrive in several outputs
    first, again = (["".join(parts) for parts in zip(*outputs(path))] for _ in range(2))
    assert first == again
