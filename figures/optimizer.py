"""Draw four rules descending one narrow valley: writes optimizer.svg beside this
file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

curvature, start, steps = np.array([1.0, 20.0]), np.array([-3.6, 1.1]), 40


def path(rule):
    w, m, v, points = start.copy(), 0, 0, [start]
    for t in range(1, steps + 1):
        update, m, v = rule(curvature * w, m, v, t)
        w = w - update
        points.append(w)
    return np.array(points)


def gradient_descent(g, m, v, t):
    return 0.08 * g, m, v


def momentum(g, m, v, t):
    m = 0.7 * m + g
    return 0.08 * m, m, v


def rms_scaling(g, m, v, t):
    v = 0.95 * v + 0.05 * g**2
    return 0.2 * g / np.sqrt(v / (1 - 0.95**t)), m, v


def adam(g, m, v, t):
    m, v = 0.7 * m + 0.3 * g, 0.95 * v + 0.05 * g**2
    return 0.2 * m / (1 - 0.7**t) / np.sqrt(v / (1 - 0.95**t)), m, v


rules = {
    "gradient descent, rate 0.08": gradient_descent,
    "momentum 0.7, rate 0.08": momentum,
    "scaled by weight, rate 0.2": rms_scaling,
    "both (Adam), rate 0.2": adam,
}
x, y = np.meshgrid(np.linspace(-4, 1.2, 200), np.linspace(-1.5, 1.5, 200))
figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), sharey=True)
for ax, (title, rule), color in zip(axes, rules.items(), ("C1", "C3", "C2", "C0")):
    height = curvature[0] * x**2 + curvature[1] * y**2
    ax.contour(
        x,
        y,
        height,
        levels=np.array([0.15, 1, 3, 7, 13, 21, 32, 45]),
        colors="#b9c2c8",
        linewidths=0.8,
    )
    points = path(rule)
    ax.plot(*points.T, marker="o", markersize=2.5, linewidth=1.2, color=color)
    ax.plot(0, 0, marker="+", color="black", markersize=8)
    ax.set_title(title, fontsize=10)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
figure.savefig(HERE / "optimizer.svg", metadata={"Date": None})
