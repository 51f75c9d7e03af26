"""What several figures draw: boxes with words, and arrows between them."""

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

GREY = "#5f6b73"


def box(
    ax: Axes,
    x: float,
    y: float,
    text: str,
    width: float,
    height: float = 0.7,
    face: str = "#e9edf0",
    ink: str = "black",
    fontsize: float = 9,
    family: str = "sans-serif",
) -> None:
    """Draw a box of which (x, y) is the lower left corner."""
    corners = "round,pad=0.02,rounding_size=0.1"
    ax.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle=corners, facecolor=face, edgecolor="none"
        )
    )
    ax.text(
        x + width / 2,
        y + height / 2,
        text,
        ha="center",
        va="center",
        fontsize=fontsize,
        color=ink,
        family=family,
    )


def arrow(ax: Axes, *points: tuple[float, float], style: str = "-|>") -> None:
    """Draw a line through the points, with a head at the last."""
    for start, end in zip(points, points[1:]):
        head = style if end == points[-1] else "-"
        shape = {"arrowstyle": head, "color": GREY, "linewidth": 1.3}
        ax.annotate("", end, start, arrowprops={**shape, "shrinkA": 0, "shrinkB": 0})
