"""Draw one answer as a client sees it, whole and streamed: writes streaming.svg beside
this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
PIECES = ["The", " capital", " of", " France", " is", " Paris", "."]
READ, WIDTH = 1.5, 1.0

figure, axes = plt.subplots(2, 1, figsize=(9.5, 3.0), sharex=True)
for ax, title, streamed in (
    (axes[0], "one body at the end", False),
    (axes[1], "events: each piece when it is written", True),
):
    ax.barh(1, READ, height=0.6, color="#c9dcec")
    ax.text(READ / 2, 1, "reads", ha="center", va="center", fontsize=9)
    for i, piece in enumerate(PIECES):
        left = READ + i * WIDTH
        ax.barh(1, WIDTH, left=left, height=0.6, color="#0b63a5", edgecolor="white")
        label = piece.strip()
        ax.text(
            left + 0.5, 1, label, ha="center", va="center", color="white", fontsize=9
        )
        if streamed:
            arrow = {"arrowstyle": "->", "color": "#d1495b"}
            ax.annotate("", (left + 1, 0.1), (left + 1, 0.65), arrowprops=arrow)
            ax.text(left + 1, -0.15, label, ha="center", va="center", fontsize=9)
    end = READ + len(PIECES) * WIDTH
    if not streamed:
        arrow = {"arrowstyle": "->", "color": "#d1495b"}
        ax.annotate("", (end, 0.1), (end, 0.65), arrowprops=arrow)
        ax.text(end, -0.15, "".join(PIECES), ha="right", va="center", fontsize=9)
    ax.set(yticks=[0, 1], ylim=(-0.5, 1.5), xlim=(0, end + 0.5), xticks=[])
    ax.set_yticklabels(["client sees", "server"])
    ax.set_title(title, fontsize=10)
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
axes[-1].set_xlabel("time")
figure.savefig(HERE / "streaming.svg", metadata={"Date": None})
