"""Draw what `make train` gives: the loss, and what the model writes at four moments.
Reads benchmarks/first_run.json, writes first_run.svg beside this file.
"""

import json
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, RED, GREY = "#0b63a5", "#d1495b", "#5f6b73"

run = json.loads((HERE.parent / "benchmarks" / "first_run.json").read_text("utf-8"))
steps, losses = zip(*run["training"])
marks, bits = zip(*run["held_out"])

figure, (curve, text) = plt.subplots(
    1, 2, figsize=(11, 4), gridspec_kw={"width_ratios": [1, 1.35]}
)
curve.plot(steps, losses, color=BLUE)
curve.set(xlabel="step", ylabel="training loss, nats a token", ylim=(0, None))
curve.set_title("make train", loc="left")
for step, value in zip(marks, bits):
    curve.axvline(step, color=GREY, linestyle=":", linewidth=1)
    curve.text(step, 0.25, f"{value:.2f} ", color=RED, ha="right", fontsize=9)
curve.text(0, 0.75, " held-out text, bits a byte:", color=RED, fontsize=9)

text.axis("off")
text.set(xlim=(0, 1), ylim=(0, 1))
text.set_title("and what it writes", loc="left")
for i, (step, sample) in enumerate(run["samples"].items()):
    top = 0.97 - i * 0.26
    text.text(0, top, f"step {step}", color=GREY, fontsize=9, va="top")
    wrapped = textwrap.fill(" ".join(sample.split()), 62, max_lines=3)
    text.text(0.13, top, wrapped, fontsize=9.5, va="top")
figure.savefig(HERE / "first_run.svg", metadata={"Date": None})
