"""Draw how a long text is cut into windows, chopped and sliding: writes
evaluation.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
COUNTED, SEEN = "#0b63a5", "#c9dcec"
LENGTH, CONTEXT = 24, 8


def windows(stride):
    first, end = 0, CONTEXT
    while first < LENGTH:
        yield max(0, end - CONTEXT), first, end
        first, end = end, min(end + stride, LENGTH)


figure, axes = plt.subplots(2, 1, figsize=(9.5, 4.6), sharex=True, height_ratios=(3, 4))
for ax, stride, title in (
    (axes[0], CONTEXT, "chopped: the stride is the context"),
    (axes[1], CONTEXT // 2, "sliding: the stride is half the context"),
):
    rows = list(windows(stride))
    for row, (start, first, end) in enumerate(rows):
        for t in range(start, end):
            counted = t >= first
            ax.add_patch(
                plt.Rectangle(
                    (t + 0.06, row + 0.12),
                    0.88,
                    0.76,
                    color=COUNTED if counted else SEEN,
                )
            )
            if counted:
                ax.text(
                    t + 0.5,
                    row + 0.5,
                    str(t - start + 1),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white",
                )
    ax.set(
        xlim=(0, LENGTH),
        ylim=(len(rows), 0),
        xticks=[],
        yticks=[r + 0.5 for r in range(len(rows))],
    )
    ax.set_yticklabels([f"window {r + 1}" for r in range(len(rows))], fontsize=8)
    ax.tick_params(length=0)
    ax.set_title(title, fontsize=10)
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
axes[1].set_xlabel(
    "tokens of one text; dark: counted, with the number of tokens that the next one is"
    " predicted from; light: read only"
)
figure.savefig(HERE / "evaluation.svg", metadata={"Date": None})
