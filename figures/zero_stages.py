"""Draw what each of two processes holds at the four stages of ZeRO: writes
zero_stages.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
GROUPS = (("weights", "#0b63a5"), ("gradient", "#2a9d60"), ("moments", "#d1495b"))
# which groups are halved, what is sent, and how many bytes are held of 32
STAGES = (
    ("0  data parallel", (), "all-reduce the gradient", 32),
    ("1  ZeRO-1", ("moments",), "reduce-scatter the gradient,\nall-gather weights", 24),
    (
        "2  ZeRO-2",
        ("gradient", "moments"),
        "the same, and the other half of\nthe gradient is dropped",
        20,
    ),
    (
        "3  ZeRO-3, FSDP",
        ("weights", "gradient", "moments"),
        "all-gather weights twice,\nreduce-scatter the gradient",
        16,
    ),
)

figure, ax = plt.subplots(figsize=(10.0, 4.3))
ax.set(xlim=(-3.6, 17.9), ylim=(-4.55, 1.35))
ax.axis("off")
for rank in range(2):
    left = 6.0 * rank
    ax.text(left + 2.6, 1.15, f"rank {rank}", ha="center", fontsize=11)
    for group, (name, _) in enumerate(GROUPS):
        ax.text(left + 1.8 * group + 0.8, 0.8, name, ha="center", fontsize=8.5)
ax.text(12.1, 0.8, "what is sent", fontsize=8.5)
ax.text(17.9, 0.8, "held", fontsize=8.5, ha="right")
for stage, (title, halved, sent, held) in enumerate(STAGES):
    y = -1.25 * stage - 0.2
    ax.text(-3.6, y, title, va="center", fontsize=10)
    for rank in range(2):
        for group, (name, color) in enumerate(GROUPS):
            for weight in range(2):
                inside = name not in halved or weight == rank
                corner = (6.0 * rank + 1.8 * group + 0.8 * weight, y - 0.35)
                face = color if inside else "#eef1f3"
                ax.add_patch(Rectangle(corner, 0.76, 0.7, facecolor=face))
    ax.text(12.1, y, sent, va="center", fontsize=8.5, color="#3b454c")
    ax.text(17.9, y, f"{held} bytes", va="center", ha="right", fontsize=9)
figure.savefig(HERE / "zero_stages.svg", metadata={"Date": None})
