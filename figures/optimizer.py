"""Draw four rules descending one narrow valley, a hundred times as steep across as
along: writes optimizer.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

steepness, start, steps = np.array([1.0, 100.0]), np.array([4.0, 1.0]), 20


def path(rule):
    w, m, v, points = start.copy(), 0, 0, [start]
    for t in range(1, steps + 1):
        update, m, v = rule(steepness * w, m, v, t)
        w = w - update
        points.append(w)
    return np.array(points)


def gradient_descent(g, m, v, t):
    return 0.015 * g, m, v


def momentum(g, m, v, t):
    m = 0.9 * m + g
    return 0.015 * m, m, v


def rmsprop(g, m, v, t):
    v = 0.95 * v + 0.05 * g**2
    return 0.5 * g / np.sqrt(v / (1 - 0.95**t)), m, v


def adam(g, m, v, t):
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
    return 0.5 * m / (1 - 0.9**t) / np.sqrt(v / (1 - 0.95**t)), m, v


rules = {
    "gradient descent, rate 0.015": gradient_descent,
    "momentum 0.9, rate 0.015": momentum,
    "RMSProp, rate 0.5": rmsprop,
    "Adam, rate 0.5": adam,
}
x, y = np.meshgrid(np.linspace(-4.4, 4.6, 80), np.linspace(-1.5, 1.5, 80))
height = 0.5 * (steepness[0] * x**2 + steepness[1] * y**2)
figure, axes = plt.subplots(2, 2, figsize=(9, 5), sharex=True, sharey=True)
colors = ("C1", "C3", "C2", "C0")
for ax, (title, rule), color in zip(axes.flat, rules.items(), colors):
    levels = [0.5, 2, 5, 10, 20, 40, 70]
    ax.contour(x, y, height, levels=levels, colors="#b9c2c8", linewidths=0.8)
    points = path(rule)
    ax.plot(*points.T, marker="o", markersize=3, linewidth=1.2, color=color)
    ax.plot(0, 0, marker="+", color="black", markersize=9)
    a, b = points[-1]
    ax.text(-4.2, -1.35, f"after {steps} steps: a {a:.2f}, b {b:.2f}", size=9)
    ax.set_title(title, fontsize=10)
    ax.grid(False)
for ax in axes[1]:
    ax.set_xlabel("a")
for ax in axes[:, 0]:
    ax.set_ylabel("b")
figure.savefig(HERE / "optimizer.svg", metadata={"Date": None})
