"""Draw what one pass of prefill and three of decode compute and fetch, for the words
of the chapter's first page: writes prefill.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, arrow, box
from matplotlib.patches import Rectangle

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
NOW, KEPT, WEIGHTS = "#0b63a5", "#a9c9e4", "#c3cad0"

words, prompt = ["look", ",", "the", "cat", "sat", "down", "."], 3
LEFT, WIDE, HIGH = 1.75, 0.92, 0.56  # of the first word; of every word
FETCHED, COMPUTED = 8.75, 11.75  # where the bars begin


def place(column: int) -> float:
    return LEFT + column * (WIDE + 0.06)


figure, ax = plt.subplots(figsize=(11.5, 3.9))
for row in range(len(words) - prompt):
    y = -row - (0.25 if row else 0)
    known = prompt + row  # words that are there when the pass begins
    for column in range(known):
        new = column == known - 1 or row == 0
        face, ink = (NOW, "white") if new else (KEPT, "black")
        box(ax, place(column), y, words[column], WIDE, HIGH, face, ink)
    box(ax, place(known), y, words[known], WIDE, HIGH, "white", GREY)
    ends = (place(known) - 0.03, y + HIGH / 2), (place(known) + 0.17, y + HIGH / 2)
    arrow(ax, *ends)
    if row < len(words) - prompt - 1:
        below = -row - 1 - 0.25 + HIGH
        arrow(ax, (place(known) + WIDE / 2, y), (place(known) + WIDE / 2, below))
    middle = {"va": "center", "fontsize": 9.5}
    ax.text(0, y + HIGH / 2, "prefill" if row == 0 else f"decode {row}", **middle)
    bar = {"height": HIGH - 0.16, "linewidth": 0}
    ax.add_patch(Rectangle((FETCHED, y + 0.08), 2, facecolor=WEIGHTS, **bar))
    ax.text(FETCHED + 0.1, y + HIGH / 2, "all weights", **middle)
    kept = known - 1 if row else 0
    for i in range(kept):
        x = FETCHED + 2.04 + 0.11 * i
        ax.add_patch(Rectangle((x, y + 0.08), 0.08, facecolor=KEPT, **bar))
    for i in range(prompt if row == 0 else 1):
        x = COMPUTED + 0.34 * i
        ax.add_patch(Rectangle((x, y + 0.08), 0.3, facecolor=NOW, **bar))

ax.axhline(-0.22, xmax=0.985, color=GREY, linewidth=0.8, linestyle=":")
head = {"va": "bottom", "fontsize": 9.5, "fontweight": "bold"}
ax.text(0, 0.85, "pass", **head)
ax.text(LEFT, 0.85, "words", **head)
ax.text(FETCHED, 0.85, "fetched from memory", **head)
ax.text(COMPUTED, 0.85, "computed", **head)
for x, face, text in (
    (LEFT, NOW, "goes through the model now"),
    (LEFT + 2.95, KEPT, "its keys and values come from the cache"),
):
    ax.add_patch(Rectangle((x, -4.15), 0.25, 0.25, facecolor=face))
    ax.text(x + 0.35, -4.03, text, va="center", fontsize=9)
arrow(ax, (LEFT + 6.8, -4.03), (LEFT + 7.1, -4.03))
ax.text(LEFT + 7.2, -4.03, "chosen: the next pass reads it", va="center", fontsize=9)
ax.set(xlim=(-0.1, 13.0), ylim=(-4.3, 1.2))
ax.set_axis_off()
figure.savefig(HERE / "prefill.svg", metadata={"Date": None})
