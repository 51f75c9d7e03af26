"""Take the timeline of its run from the committed chapter on pretraining: writes
timeline.json beside this file.
"""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHAPTERS = HERE.parents[1] / "chapters"


def timeline() -> dict:
    """Return what the chapter's cell displays as JSON."""
    (path,) = CHAPTERS.glob("*_pretraining.ipynb")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    (found,) = [
        output["data"]["application/json"]
        for output in outputs
        if "application/json" in output.get("data", {})
    ]
    return found


def main() -> None:
    text = json.dumps(timeline(), ensure_ascii=False) + "\n"
    (HERE / "timeline.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
