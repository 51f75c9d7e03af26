import os
import sys
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(
    0, str(Path(__file__).resolve().parents[1] / "chapters")
)  # book.py: scramble_
torch.set_num_threads(1)


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
