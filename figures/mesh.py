"""Draw a 2 x 2 mesh of ranks on two machines into mesh.svg."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, RED, GREY = "#0b63a5", "#d1495b", "#5f6b73"

figure, ax = plt.subplots(figsize=(9.0, 3.9))
ax.set(xlim=(-0.2, 10.6), ylim=(-0.35, 4.3))
ax.axis("off")
for machine, y in ((0, 2.45), (1, 0.0)):
    ax.add_patch(
        FancyBboxPatch(
            (1.2, y),
            6.3,
            1.45,
            boxstyle="round,pad=0.02,rounding_size=0.1",
            facecolor="#f1f3f5",
            edgecolor="#c3cbd1",
        )
    )
    ax.text(1.0, y + 0.72, f"machine {machine}", ha="right", va="center", fontsize=10)
    for local, x in ((0, 1.5), (1, 5.3)):
        ax.add_patch(
            FancyBboxPatch(
                (x, y + 0.22),
                1.9,
                1.0,
                boxstyle="round,pad=0.02,rounding_size=0.08",
                facecolor=BLUE if local == 0 else RED,
                edgecolor="none",
            )
        )
        ax.text(
            x + 0.95,
            y + 0.72,
            f"rank {2 * machine + local}\n{'first' if local == 0 else 'second'} half",
            ha="center",
            va="center",
            fontsize=9.5,
            color="white",
        )
    ax.annotate(
        "",
        (5.2, y + 0.72),
        (3.5, y + 0.72),
        arrowprops={"arrowstyle": "<|-|>", "color": GREY, "linewidth": 1.8},
    )
    ax.text(
        4.35, y + 0.86, "all-gather\nof weights", ha="center", va="bottom", fontsize=8.5
    )
    ax.text(
        4.35,
        y + 0.58,
        "reduce-scatter\nof gradients",
        ha="center",
        va="top",
        fontsize=8.5,
    )
for x in (2.45, 6.25):
    ax.annotate(
        "",
        (x, 1.3),
        (x, 2.6),
        arrowprops={
            "arrowstyle": "<|-|>",
            "color": GREY,
            "linewidth": 1.2,
            "linestyle": "--",
        },
    )
ax.text(
    4.35,
    1.95,
    "all-reduce of half the gradients",
    ha="center",
    va="center",
    fontsize=8.5,
)
ax.text(
    4.35,
    4.1,
    "dimension “shard”: within a machine, fast links",
    ha="center",
    va="center",
    fontsize=9.5,
    color=GREY,
)
ax.text(
    7.8,
    1.95,
    "dimension “replicate”:\nbetween machines,\nslow links",
    ha="left",
    va="center",
    fontsize=9.5,
    color=GREY,
)
figure.savefig(HERE / "mesh.svg", metadata={"Date": None})
