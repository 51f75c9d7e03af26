"""Draw what RMSNorm and LayerNorm do to points of a plane: writes rmsnorm.svg beside
this file.
"""

from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

points = (
    torch.randn(160, 2, generator=torch.Generator().manual_seed(0))
    * torch.tensor([1.2, 0.8])
    + 0.3
)
angle = torch.atan2(points[:, 1], points[:, 0])
panels = [
    ("input x", points),
    ("RMSNorm: a circle of radius √2", F.rms_norm(points, (2,))),
    (
        "weight (1.3, 0.6): an ellipse",
        F.rms_norm(points, (2,)) * torch.tensor([1.3, 0.6]),
    ),
    ("LayerNorm: two points", F.layer_norm(points, (2,), eps=1e-12)),
]
figure, axes = plt.subplots(1, 4, figsize=(11, 3.1), sharex=True, sharey=True)
for ax, (title, xy) in zip(axes, panels):
    ax.scatter(xy[:, 0], xy[:, 1], c=angle, cmap="twilight", s=14)
    ax.set_title(title, fontsize=9)
    ax.set(
        aspect="equal",
        xlim=(-3.2, 3.2),
        ylim=(-3.2, 3.2),
        xticks=[-2, 0, 2],
        yticks=[-2, 0, 2],
    )
figure.savefig(HERE / "rmsnorm.svg", metadata={"Date": None})
