"""Draw three ways of answering five requests with two rows: writes serving.svg
beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
COLORS = {
    "a": "#0b63a5",
    "b": "#d1495b",
    "c": "#2a9d60",
    "d": "#e0a100",
    "e": "#6a4c93",
}
LENGTHS = {"a": 8, "b": 3, "c": 2, "d": 5, "e": 3}

one, start = [], 0
for name, length in LENGTHS.items():
    one.append((name, 0, start))
    start += length
static, start = [], 0
for pair in ("ab", "cd", "e"):
    static += [(name, row, start) for row, name in enumerate(pair)]
    start += max(LENGTHS[name] for name in pair)
continuous, free = [], [0, 0]
for name, length in LENGTHS.items():
    row = free.index(min(free))
    continuous.append((name, row, free[row]))
    free[row] += length

figure, axes = plt.subplots(
    3, 1, figsize=(9.5, 4.3), sharex=True, height_ratios=[1, 2, 2]
)
titles = (
    "one after the other",
    "batches that wait for their longest",
    "rows that are filled again at once",
)
for ax, title, plan in zip(axes, titles, (one, static, continuous)):
    rows = 1 + max(row for _, row, _ in plan)
    end = max(begin + LENGTHS[name] for name, _, begin in plan)
    ax.barh(range(rows), end, height=0.74, color="#e6e9eb")
    for name, row, begin in plan:
        ax.barh(row, LENGTHS[name], left=begin, height=0.74, color=COLORS[name])
        ax.text(
            begin + LENGTHS[name] / 2,
            row,
            name,
            ha="center",
            va="center",
            color="white",
            fontsize=10,
        )
    ax.text(end + 0.2, (rows - 1) / 2, f"{end} steps", va="center", fontsize=9)
    ax.set(
        yticks=range(rows),
        yticklabels=[f"row {row}" for row in range(rows)],
        xlim=(0, 23.5),
        ylim=(rows - 0.5, -0.5),
    )
    ax.set_title(title, fontsize=10)
    ax.grid(False)
axes[-1].set_xlabel("steps of the model")
figure.savefig(HERE / "serving.svg", metadata={"Date": None})
