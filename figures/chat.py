"""Draw what the cache holds from turn to turn: writes chat.svg beside this file."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
OLD, NEW, SAID = "#c9d6df", "#0b63a5", "#2a9d60"

figure, ax = plt.subplots(figsize=(9.0, 3.0))
ax.set(xlim=(-1.6, 14.0), ylim=(2.45, -0.9))
ax.axis("off")
turns = [
    [("system", 3, NEW), ("question 1", 2, NEW), ("answer 1", 1.6, SAID)],
    [
        ("system", 3, OLD),
        ("question 1", 2, OLD),
        ("answer 1", 1.6, OLD),
        ("question 2", 2, NEW),
        ("answer 2", 1.6, SAID),
    ],
    [
        ("system", 3, OLD),
        ("question 1", 2, OLD),
        ("answer 1", 1.6, OLD),
        ("question 2", 2, OLD),
        ("answer 2", 1.6, OLD),
        ("question 3", 2, NEW),
        ("answer 3", 1.6, SAID),
    ],
]
for row, parts in enumerate(turns):
    ax.text(-0.2, row, f"turn {row + 1}", ha="right", va="center", fontsize=10)
    start = 0
    for name, width, color in parts:
        ax.barh(row, width - 0.06, left=start, height=0.62, color=color)
        ax.text(
            start + width / 2 - 0.03,
            row,
            name,
            ha="center",
            va="center",
            fontsize=8.5,
            color="black" if color == OLD else "white",
        )
        start += width
for x, name, color in (
    (0, "already in the cache", OLD),
    (4.2, "read now", NEW),
    (6.8, "written now", SAID),
):
    ax.barh(-0.72, 0.4, left=x, height=0.22, color=color)
    ax.text(x + 0.55, -0.72, name, va="center", fontsize=9)
figure.savefig(HERE / "chat.svg", metadata={"Date": None})
