"""Draw the wiring of three feed-forward layers and their activation functions: writes
swiglu.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
blue, red, green = "#0b63a5", "#d1495b", "#2a9d60"

figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.5, 3.6), gridspec_kw={"width_ratios": [1.5, 1]}
)


def box(x, y, text, colour, width=1.25):
    left.add_patch(
        plt.Rectangle((x, y - 0.22), width, 0.44, facecolor=colour, alpha=0.9)
    )
    left.text(
        x + width / 2, y, text, ha="center", va="center", color="white", fontsize=9
    )


def arrow(start, end):
    left.annotate(
        "", end, start, arrowprops={"arrowstyle": "->", "color": "#444444", "lw": 1.2}
    )


left.text(0, 3.0, "MLP: two matrices", fontsize=10)
for x, (text, colour) in zip(
    (0.5, 2.5, 4.5), (("up  D→F", blue), ("ReLU", green), ("down  F→D", blue))
):
    box(x, 2.45, text, colour)
    arrow((x - 0.7, 2.45), (x - 0.02, 2.45))
arrow((5.75, 2.45), (6.4, 2.45))
left.text(0, 1.6, "SwiGLU: three matrices, one of them a gate", fontsize=10)
box(0.5, 1.05, "gate  D→F", red)
box(2.5, 1.05, "SiLU", green)
box(0.5, 0.2, "up  D→F", blue)
box(4.9, 0.62, "down  F→D", blue)
left.text(4.3, 0.62, "×", ha="center", va="center", fontsize=16)
for start, end in (
    ((-0.2, 0.62), (0.48, 1.05)),
    ((-0.2, 0.62), (0.48, 0.2)),
    ((1.75, 1.05), (2.48, 1.05)),
    ((3.75, 1.05), (4.2, 0.7)),
    ((1.75, 0.2), (4.2, 0.55)),
    ((4.42, 0.62), (4.88, 0.62)),
    ((6.15, 0.62), (6.7, 0.62)),
):
    arrow(start, end)
left.set(xlim=(-0.4, 6.9), ylim=(-0.2, 3.3))
left.axis("off")

x = torch.linspace(-4, 4, 400)
for name, f in (("ReLU", F.relu), ("GELU", F.gelu), ("SiLU", F.silu)):
    right.plot(x, f(x), label=name)
right.legend()
right.set(xlabel="input", ylim=(-0.6, 4))
right.set_title("three activation functions", fontsize=10)
figure.savefig(HERE / "swiglu.svg", metadata={"Date": None})
