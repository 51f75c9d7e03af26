import os
import sys
from pathlib import Path

import forks  # now, so that every process forked in a test has torch already
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
# book.py: scramble_
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "chapters"))
torch.set_num_threads(1)
pytest.register_assert_rewrite("checkpoint_cases", "text_helpers", "weights_helpers")


LONG = {"test_gpu_script", "test_site", "test_wheel", "test_readme"}


def pytest_collection_modifyitems(items):
    """Begin with the long ones: one that begins last keeps the other cores idle."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty directory to work in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def events(monkeypatch):
    """What is flushed to the disk, and what gets the name `-> name`, in their order."""
    events, fsync, rename = [], os.fsync, Path.rename

    def noted(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def renamed(path, target):
        events.append(f"-> {target}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    return events


@pytest.fixture
def here(folder, tmp_path):
    """An empty directory with a checkpoint "c", and documents "d.jsonl"."""
    from helpers import BYTES, small_model
    from qwen_analog.checkpoint import save_checkpoint
    from qwen_analog.jsonl import write_jsonl

    save_checkpoint("c", small_model(), BYTES)
    documents = (
        {"title": f"t{i}", "text": f"document {i} says that {i} is a number"}
        for i in range(200)
    )
    write_jsonl(documents, "d.jsonl")
    return tmp_path


@pytest.fixture(scope="module")
def model():
    from helpers import small_model

    return small_model()


@pytest.fixture(scope="module")
def browser():
    """Chromium. Its event loop runs while it is open, and no other module meets it."""
    from browser_helpers import CHROMIUM

    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox refuses to run as root, as CI does
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


def pytest_terminal_summary(terminalreporter):
    """Which check kills which mutant of `test_parity.py`, and by how much."""
    rows = [
        dict(report.user_properties)["mutant"]
        for report in terminalreporter.stats.get("passed", [])
        if "mutant" in dict(report.user_properties)
    ]
    if rows:
        terminalreporter.section(
            "mutants: distance from the reference, * where it is above the bound of"
            " 1e-5"
        )
    for name, found in rows:
        terminalreporter.write_line(
            f"{name:24}"
            + "".join(
                f"{check:>12} {value:8.1e}{'*' if value > 1e-5 else ' '}"
                for check, value in found.items()
            )
        )
