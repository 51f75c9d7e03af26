"""Join pieces of one stream that a slow machine delivered apart, so that running a
chapter again changes nothing: `make execute` does it.
"""

import json
import sys
from pathlib import Path


def joined(outputs: list[dict]) -> list[dict]:
    """Return outputs in which no two neighbours are of the same stream."""
    result: list[dict] = []
    for output in outputs:
        last = result[-1] if result else {}
        if output.get("name") and output["name"] == last.get("name"):
            text = "".join(last["text"]) + "".join(output["text"])
            last["text"] = text.splitlines(keepends=True)
        else:
            result.append(output)
    return result


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if "outputs" in cell:
                cell["outputs"] = joined(cell["outputs"])
        text = json.dumps(notebook, ensure_ascii=False, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
