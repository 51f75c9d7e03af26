"""Draw a table of documents, the epoch of one side of it, and what one sequence reads:
writes dataset_table.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
TEXTS = ("the cat sat", "a hat", "in the hat.", "on a mat")  # the chapter's
HELD_OUT, COLOURS, PALE = (2, 3), ("#a9c9e4", "#f0b5bd"), "#eef1f3"
MARK, RED = "#2b3640", "#d1495b"
FIRST, TOKENS = 8, 9


def squares(ax, x, y, row):
    """A square a token; the mark that opens the document is dark."""
    for i, letter in enumerate("|" + TEXTS[row]):
        held = row in HELD_OUT
        face = PALE if held else MARK if i == 0 else COLOURS[row]
        ink = "#9aa4ab" if held else "white" if i == 0 else "black"
        ax.add_patch(plt.Rectangle((x + i, y), 0.92, 0.92, facecolor=face))
        ax.text(x + i + 0.46, y + 0.46, letter, color=ink, ha="center", va="center")
    return len(TEXTS[row]) + 1


figure, ax = plt.subplots(figsize=(9, 3.9))
for row in range(4):
    y = 6.6 - 1.1 * row
    side = "held out" if row in HELD_OUT else "training"
    ax.text(-0.4, y + 0.46, f"row {row}, {side}", ha="right", va="center")
    squares(ax, 0, y, row)
ax.text(-0.4, 0.46, "the epoch", ha="right", va="center")
x = 0
for row in (0, 1):
    tokens = len(TEXTS[row]) + 1
    start, stop = max(FIRST - x, 0), min(FIRST + TOKENS - x, tokens)
    frame = plt.Rectangle((start - 0.06, 6.54 - 1.1 * row), stop - start + 0.04, 1.04)
    frame.set(fill=False, edgecolor=RED, linewidth=1.8, zorder=3)
    ax.add_patch(frame)
    x += squares(ax, x, 0, row)
left, right = FIRST, FIRST + TOKENS - 0.08
ax.plot([left, left, right, right], [-0.2, -0.45, -0.45, -0.2], color=RED)
label = "nine tokens from place 8"
ax.text((left + right) / 2, -1.2, label, ha="center", color=RED)
ax.text(0, 7.9, "the table on the disk", weight="bold")
ax.text(0, 1.35, "rows 0 and 1, end to end", weight="bold")
ax.set(xlim=(-5.5, x + 0.3), ylim=(-1.5, 8.5), aspect="equal")
ax.axis("off")
figure.savefig(HERE / "dataset_table.svg", metadata={"Date": None})
