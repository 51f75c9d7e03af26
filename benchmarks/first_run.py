"""Collect what a finished `make train` has to show: its losses, its evaluations, and
what each checkpoint writes. `figures/first_run.py` draws it.

    python benchmarks/first_run.py checkpoints
"""

import json
import sys
from pathlib import Path

from qwen_analog import load
from qwen_analog.text_stream import complete

PROMPT = "The city of Paris"


def main(run: Path) -> None:
    rows = [json.loads(line) for line in open(run / "metrics.jsonl", encoding="utf-8")]
    samples = {}
    last = rows[-1]["step"]
    saved = {int(p.name.partition("_")[2]): p for p in run.glob("step_*")}
    saved[last] = run / "final"
    for step, directory in sorted(saved.items()):
        model, tokenizer = load(directory)
        text = complete(
            model, tokenizer, PROMPT, max_new_tokens=40, temperature=0.7, seed=0
        )
        samples[step] = text
    found = {
        "training": [[r["step"], r["loss"]] for r in rows if "loss" in r],
        "held_out": [
            [r["step"], r["heldout_bits_per_byte"]]
            for r in rows
            if "heldout_bits_per_byte" in r
        ],
        "samples": samples,
    }
    target = Path(__file__).with_name("first_run.json")
    target.write_text(
        json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
