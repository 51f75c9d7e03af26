"""Draw the way of one line through the command: writes command_line.svg beside this
file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, arrow, box
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

figure, ax = plt.subplots(figsize=(9.8, 3.5))
ax.set(xlim=(0, 13.4), ylim=(0.1, 4.9))
ax.axis("off")
BLUE = "#0b63a5"


def function(x: float, words: str, width: float) -> None:
    box(ax, x, 3.1, words, width, 0.7, BLUE, "white", family="monospace")


def between(x: float, words: str) -> None:
    ax.text(x, 3.9, words, ha="center", va="bottom", fontsize=9, color=GREY)


frame = FancyBboxPatch(
    (2.75, 2.75),
    8.0,
    1.9,
    boxstyle="round,pad=0.02,rounding_size=0.15",
    facecolor="none",
    edgecolor=BLUE,
    linewidth=1.3,
)
ax.add_patch(frame)
ax.text(2.9, 4.5, "report_errors", va="top", fontsize=9, color=BLUE, family="monospace")
box(ax, 0.1, 3.1, "generate Paris", 2.0, 0.7, family="monospace")
function(3.0, "build_parser", 1.9)
function(6.2, "find", 1.1)
function(8.4, "generate", 2.1)
box(ax, 11.5, 3.1, "exit code 0", 1.7)
between(5.55, "arguments")
between(7.85, "function")
for start, end in ((2.15, 2.95), (4.95, 6.15), (7.35, 8.35), (10.55, 11.45)):
    arrow(ax, (start, 3.45), (end, 3.45))
for x, why, width, words in (
    (3.7, "ValueError, OSError:\na mistake of the user", 2.2, "one line, exit code 2"),
    (7.2, "KeyboardInterrupt:\nCtrl-C", 1.8, "exit code 130"),
    (10.0, "any other exception:\na fault of the program", 2.3, "stack trace, code 1"),
):
    arrow(ax, (x, 2.7), (x, 1.05))
    ax.text(x + 0.15, 1.9, why, va="center", fontsize=9)
    box(ax, x - width / 2, 0.3, words, width)
figure.savefig(HERE / "command_line.svg", metadata={"Date": None})
