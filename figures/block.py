"""Draw the two branches of a block with the shape on every arrow: writes block.svg
beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
STREAM, RED, BLUE, GREEN = "#e0a100", "#d1495b", "#0b63a5", "#2a9d60"
ENDS = [(0.9, 1.1), (3.1, 1.3), (6.4, 2.3), (10.2, 1.3)]  # left, width of each box

figure, ax = plt.subplots(figsize=(11, 4.1))


def branch(bottom, color, parts, shapes):
    """Draw a branch of four parts; a list of two shapes stands on two lines."""
    stream = {"arrowstyle": "->", "color": STREAM, "lw": 5, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (13.9, bottom), (-0.2, bottom), arrowprops=stream)
    y = bottom + 1.2
    arrow(ax, (0.35, bottom), (0.35, y), (0.86, y))
    for (x, width), text in zip(ENDS, parts):
        face = RED if text == "norm" else color
        box(ax, x, y - 0.3, text, width, 0.6, face, "white", 8.5)
    for (x, width), (after, _) in zip(ENDS, ENDS[1:]):
        arrow(ax, (x + width + 0.03, y), (after - 0.04, y))
    arrow(ax, (11.55, y), (12.9, y), (12.9, bottom + 0.24))
    for x, lines in zip((2.55, 5.4, 9.45, 12.2), shapes):
        for k, line in enumerate(lines):
            height = y + 0.14 if k == 0 else y - 0.36
            ax.text(x, height, line, ha="center", fontsize=7.5, family="monospace")
    ring = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "#444444"}
    ax.text(12.9, bottom, "+", ha="center", va="center", fontsize=11, bbox=ring)
    words = {"ha": "center", "fontsize": 7.5, "family": "monospace", "color": "#9a6e00"}
    ax.text(6.6, bottom + 0.16, "x  [B, T, D]", **words)


D = ["[B,T,D]"]
attention = ["norm", "q, k, v\nrotate q, k", "softmax(q k / √h + mask) v", "output"]
branch(2.6, BLUE, attention, [D, ["q [B,H,T,h]", "k,v [B,K,T,h]"], ["[B,T,H·h]"], D])
feed_forward = ["norm", "gate, up", "silu(gate) · up", "down"]
branch(0, GREEN, feed_forward, [D, ["gate [B,T,F]", "up [B,T,F]"], ["[B,T,F]"], D])
ax.text(-0.2, 4.35, "attention: from token to token", fontsize=9, color=BLUE)
ax.text(-0.2, 1.75, "SwiGLU: at each token alone", fontsize=9, color=GREEN)
ax.set(xlim=(-0.3, 14), ylim=(-0.3, 4.7))
ax.axis("off")
figure.savefig(HERE / "block.svg", metadata={"Date": None})
