"""Draw the whole model: embedding, one of the blocks on the residual stream, final
norm, head, tie. Writes model.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
blue, red, green, grey, stream = "#0b63a5", "#d1495b", "#2a9d60", "#5f6b73", "#e0a100"

figure, ax = plt.subplots(figsize=(11, 4.0))


def box(x, y, text, colour, width=1.5):
    ax.add_patch(
        plt.Rectangle(
            (x - width / 2, y - 0.26), width, 0.52, facecolor=colour, zorder=3
        )
    )
    ax.text(x, y, text, ha="center", va="center", color="white", fontsize=9, zorder=4)


def arrow(start, end, **style):
    ax.annotate(
        "",
        end,
        start,
        arrowprops={
            "arrowstyle": "->",
            "color": "#444444",
            "lw": 1.3,
            "shrinkA": 0,
            "shrinkB": 0,
            **style,
        },
        zorder=2,
    )


def branch(read, write, parts):
    """Leave the stream at x = `read`, pass the parts above it, come back at x =
    `write`.
    """
    middle = (read + write) / 2
    ax.plot([read, read], [1, 2.6], color="#444444", lw=1.3)
    ax.plot([read, middle], [2.6, 2.6], color="#444444", lw=1.3)
    ax.plot([middle, write], [2.6, 2.6], color="#444444", lw=1.3)
    arrow((write, 2.6), (write, 1.17))
    for offset, (text, colour, width) in zip((-0.72, 0.72), parts):
        box(middle + offset, 2.6, text, colour, width)
    ax.text(
        write,
        1,
        "+",
        ha="center",
        va="center",
        fontsize=12,
        zorder=6,
        bbox={
            "boxstyle": "circle,pad=0.15",
            "facecolor": "white",
            "edgecolor": "#444444",
        },
    )


ax.annotate(
    "",
    (12.0, 1),
    (1.7, 1),
    arrowprops={
        "arrowstyle": "->",
        "color": stream,
        "lw": 5,
        "shrinkA": 0,
        "shrinkB": 0,
    },
)
ax.add_patch(
    plt.Rectangle((2.5, 0.4), 8.6, 2.95, fill=False, edgecolor=grey, linestyle="--")
)
ax.text(2.6, 3.47, "block, L of them in a row", fontsize=9, color=grey)
branch(2.9, 6.4, (("norm", red, 1.0), ("attention", blue, 1.3)))
branch(7.1, 10.6, (("norm", red, 1.0), ("SwiGLU", green, 1.3)))
ax.text(2.98, 1.55, "read", fontsize=8, color="#444444")
ax.text(6.32, 1.55, "write", fontsize=8, color="#444444", ha="right")
ax.text(7.18, 1.55, "read", fontsize=8, color="#444444")
ax.text(10.52, 1.55, "write", fontsize=8, color="#444444", ha="right")
ax.text(
    6.75, 0.62, "residual stream [B, T, D]", fontsize=9, color="#9a6e00", ha="center"
)

ax.text(-0.75, 1, "ids\n[B, T]", ha="center", va="center", fontsize=9)
arrow((-0.35, 1), (0.25, 1))
box(0.95, 1, "embedding", grey, 1.4)
box(12.6, 1, "final norm", red, 1.2)
arrow((13.2, 1), (13.55, 1))
box(14.2, 1, "head", grey, 1.25)
arrow((14.83, 1), (15.25, 1))
ax.text(15.75, 1, "logits\n[B, T, V]", ha="center", va="center", fontsize=9)
ax.plot([0.95, 14.2], [-0.05, -0.05], color=grey, lw=1.3, linestyle="--")
arrow((0.95, -0.05), (0.95, 0.72), color=grey, linestyle="--")
arrow((14.2, -0.05), (14.2, 0.72), color=grey, linestyle="--")
ax.text(6.75, -0.38, "tied: one matrix [V, D]", ha="center", fontsize=9, color=grey)
ax.set(xlim=(-1.2, 16.4), ylim=(-0.55, 3.75))
ax.axis("off")
figure.savefig(HERE / "model.svg", metadata={"Date": None})
