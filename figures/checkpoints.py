"""Draw two ways of saving on a time axis into checkpoints.svg."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
WHOLE, HALF = "#0b63a5", "#eba9b2"

figure, axes = plt.subplots(2, 1, figsize=(9.5, 3.9), sharex=True)
for ax, title in zip(axes, ("over the old file", "beside it, then rename")):
    ax.set(xlim=(0, 10), ylim=(-0.2, 2.3), xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    ax.grid(False)
    ax.spines["left"].set_visible(False)


def bar(ax, start, end, row, text, face):
    ax.barh(row, end - start, left=start, height=0.7, color=face)
    ax.text(
        (start + end) / 2,
        row,
        text,
        ha="center",
        va="center",
        fontsize=9,
        color="white" if face == WHOLE else "black",
    )


top, bottom = axes
bar(top, 0, 4, 0.6, "step 1000, whole", WHOLE)
bar(top, 4, 7, 0.6, "half written", HALF)
bar(top, 7, 10, 0.6, "step 2000, whole", WHOLE)
top.annotate(
    "a crash here leaves nothing",
    (5.5, 1.0),
    (5.5, 1.85),
    ha="center",
    va="center",
    fontsize=9,
    arrowprops={"arrowstyle": "-|>", "color": "#d1495b"},
    color="#d1495b",
)
bar(bottom, 0, 10, 0.35, "step 1000, whole", WHOLE)
bar(bottom, 4, 7, 1.45, "step 2000.partial", HALF)
bar(bottom, 7, 10, 1.45, "step 2000, whole", WHOLE)
bottom.axvline(7, color="#5f6b73", linestyle=":", linewidth=1.2)
bottom.text(7.05, 2.1, "rename", va="center", fontsize=9, color="#5f6b73")
axes[1].set_xlabel("time")
figure.savefig(HERE / "checkpoints.svg", metadata={"Date": None})
