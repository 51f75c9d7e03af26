"""Draw commands and the files that they read and write: writes commands.svg beside
this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

figure, ax = plt.subplots(figsize=(9.8, 3.6))
ax.set(xlim=(0, 13.4), ylim=(0.2, 5.0))
ax.axis("off")


def command(x: float, y: float, words: str, width: float, height: float = 0.7) -> None:
    box(ax, x, y, words, width, height, "#0b63a5", "white", family="monospace")


def file(x: float, y: float, name: str, width: float, height: float = 0.7) -> None:
    box(ax, x, y, name, width, height, family="monospace")


command(0.1, 3.0, "prepare", 1.3)
file(2.1, 3.45, "wiki.jsonl", 2.2)
file(2.1, 2.55, "tokenizer.tiktoken", 2.2)
file(2.1, 1.4, "settings.json", 2.2)
command(5.0, 2.55, "train", 1.3)
command(5.0, 0.4, "plan", 1.3)
file(7.0, 3.45, "loss.png", 1.9)
file(7.0, 2.55, "final/", 1.9)
file(7.0, 1.65, "ledger/", 1.9)
command(9.7, 3.9, "generate, chat\nserve, eval", 1.8, 0.95)
command(9.7, 2.55, "export, import", 1.8)
command(9.7, 1.65, "trace", 1.8)
ax.text(12.7, 4.38, "text,\nscores", ha="center", va="center", fontsize=9)
ax.text(12.7, 2.9, "Hugging\nFace", ha="center", va="center", fontsize=9)
ax.text(12.7, 2.0, "documents", ha="center", va="center", fontsize=9)
ax.text(7.95, 0.75, "memory, days", ha="center", va="center", fontsize=9)
ax.text(7.95, 4.4, "checkpoints/", ha="center", fontsize=9, family="monospace")
for start, end in (
    ((1.45, 3.4), (2.05, 3.75)),
    ((1.45, 3.3), (2.05, 2.95)),
    ((4.35, 3.75), (4.95, 3.1)),
    ((4.35, 2.9), (4.95, 2.9)),
    ((4.35, 1.85), (4.95, 2.6)),
    ((4.35, 1.6), (4.95, 0.85)),
    ((6.35, 3.1), (6.95, 3.7)),
    ((6.35, 2.9), (6.95, 2.9)),
    ((6.35, 2.7), (6.95, 2.1)),
    ((6.35, 0.75), (7.0, 0.75)),
    ((8.95, 3.05), (9.65, 4.1)),
    ((8.95, 2.0), (9.65, 2.0)),
    ((11.55, 4.38), (12.1, 4.38)),
    ((11.55, 2.0), (11.95, 2.0)),
):
    arrow(ax, start, end)
for start, end in (((8.95, 2.9), (9.65, 2.9)), ((11.55, 2.9), (12.1, 2.9))):
    arrow(ax, start, end, style="<|-|>")
figure.savefig(HERE / "commands.svg", metadata={"Date": None})
