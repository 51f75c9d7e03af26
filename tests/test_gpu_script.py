"""benchmarks/gpu.sh, tried on this machine with a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {
    "machine": {"tflops", "gb_per_second", "milliseconds"},
    "train": {"tokens_per_second", "mfu", "peak_gb", "planned_gb", "milliseconds"},
    "run": {"tokens_per_second", "every_step_once", "text"},
    "torchrun": {"tokens_per_second", "every_step_once", "text"},
    "run_3b": {"tokens_per_second"},
    "decode": {"tokens_per_second", "gb_per_second", "of_bandwidth"},
    "compiled": {"tokens_per_second", "of_bandwidth", "equal_tokens"},
    "prefill": {"tokens_per_second"},
    "serve": {"tokens_per_second", "made_seconds", "recorded"},
    "transformers": {"tokens_per_second"},
    "tests": {"passed"},
}


@pytest.mark.slow
def test_every_part_writes_its_numbers_and_one_that_fails_costs_no_other(tmp_path):
    script = str(ROOT / "benchmarks" / "gpu.sh")
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [script, str(tmp_path), "--size", "tiny", "--fail", "machine"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for part, fields in FIELDS.items():
        found = json.loads((tmp_path / f"{part}.json").read_text())
        if part == "machine":
            assert "told to fail" in found["error"] and not found["cases"]
            continue
        assert "error" not in found, found
        assert fields <= set().union(*found["cases"]), part
        for case in found["cases"]:
            assert case.get("error", "not available").startswith("not available"), case
    train = json.loads((tmp_path / "train.json").read_text())["cases"]
    assert len({case["case"] for case in train}) == 8
    table = (tmp_path / "summary.md").read_text()
    assert table.splitlines()[0].count("torch") == 1
    assert all(f"| {part} |" in table for part in FIELDS)
