"""Draw a query and a key that are turned by 40 degrees a token, at three pairs of
positions: writes rope_pair.svg beside this file.
"""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Arc

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
QUERY, KEY = "#0b63a5", "#d1495b"
TURN = 40  # degrees a token

figure, panels = plt.subplots(1, 3, figsize=(9, 3.6))


def arrow(axes, degrees, name, colour):
    """Draw a vector of length 1 in the direction of `degrees`, with its name."""
    x, y = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    shape = {"arrowstyle": "-|>", "color": colour, "linewidth": 2, "shrinkA": 0}
    axes.annotate("", (x, y), (0, 0), arrowprops={**shape, "shrinkB": 0})
    style = {"color": colour, "ha": "center", "va": "center", "fontsize": 11}
    axes.text(1.32 * x, 1.16 * y, name, **style)


for axes, (m, n) in zip(panels, ((1, 0), (3, 2), (0, 1))):
    query, key = TURN * m, 90 + TURN * n  # unturned: (1, 0) and (0, 1)
    axes.add_patch(plt.Circle((0, 0), 1, fill=False, color="#c4cbd0"))
    arrow(axes, query, "query", QUERY)
    arrow(axes, key, "key", KEY)
    axes.add_patch(Arc((0, 0), 0.7, 0.7, theta1=query, theta2=key, color="#5f6b73"))
    middle = math.radians((query + key) / 2)
    place = (0.56 * math.cos(middle), 0.56 * math.sin(middle))
    axes.text(*place, f"{key - query}°", ha="center", va="center", fontsize=11)
    score = math.cos(math.radians(key - query))
    axes.set_title(f"query at {m}, key at {n}", fontsize=11)
    axes.text(
        0, -1.25, f"distance {m - n}, score {score:.2f}", ha="center", fontsize=11
    )
    axes.set(xlim=(-1.65, 1.65), ylim=(-1.4, 1.35), aspect="equal")
    axes.axis("off")
figure.savefig(HERE / "rope_pair.svg", metadata={"Date": None})
