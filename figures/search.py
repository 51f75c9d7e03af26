"""Draw three steps of a beam search with two beams: writes search.svg beside this
file.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "chapters")]
from book import scramble_  # noqa: E402

from qwen_analog import QwenConfig, QwenForCausalLM  # noqa: E402

blue, red, grey, green = "#0b63a5", "#d1495b", "#9aa3aa", "#2a9d60"
model = scramble_(
    QwenForCausalLM(
        QwenConfig(
            vocab_size=5,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            max_position_embeddings=32,
            rope_theta=1e4,
            tie_word_embeddings=False,
        )
    ),
    66,
)
with torch.no_grad():
    model.lm_head.weight *= 0.7


@torch.no_grad()
def after(tokens):
    return model(torch.tensor([[0, *tokens]]))[0, -1].softmax(-1).tolist()


best, greedy = (1, 2, 0), (0, 0, 0)
kept, places = [((), 1.0)], {(): (0, 2.0)}
figure, ax = plt.subplots(figsize=(9.5, 4.6))
ax.plot(0, 2.0, "o", color="black")
ax.text(-0.06, 2.0, "prompt", ha="right", va="center", fontsize=9)
for step in range(1, 4):
    grown = [
        ((*tokens, v), p * q) for tokens, p in kept for v, q in enumerate(after(tokens))
    ]
    if step > 1:  # the best continuation's path, which the beams left at the first step
        tokens = best[:step]
        p = 1.0
        for i in range(step):
            p *= after(best[:i])[best[i]]
        grown.append((tokens, p))
    order = sorted(grown, key=lambda item: (places[item[0][:-1]][1], item[0]))
    gap = 4 / (len(order) - 1)
    kept = sorted(
        (item for item in grown if step == 1 or item[0] != best[:step]),
        key=lambda item: -item[1],
    )[:2]
    for i, (tokens, p) in enumerate(order):
        x, y = step, i * gap
        places[tokens] = x, y
        x0, y0 = places[tokens[:-1]]
        on, optimum = (tokens, p) in kept, tokens == best[:step]
        color = blue if on else green if optimum else grey
        ax.plot(
            [x0 + 0.4 * (x0 > 0), x],
            [y0, y],
            color=color,
            linewidth=2 if on or optimum else 0.8,
            linestyle="--" if optimum else "-",
            zorder=1,
        )
        if tokens == greedy[:step]:
            ax.plot(
                x,
                y,
                "o",
                markersize=13,
                markerfacecolor="none",
                markeredgecolor=red,
                markeredgewidth=1.5,
            )
        ax.plot(x, y, "o", color=color, zorder=2)
        ax.text(
            x + 0.07,
            y,
            f"{''.join('ABCDE'[v] for v in tokens)}  {p:.3f}",
            va="center",
            fontsize=9,
            color=color if on or optimum else "#555c61",
            fontweight="bold" if on or optimum else "normal",
        )
ax.plot([], [], "-o", color=blue, label="kept by two beams")
ax.plot(
    [],
    [],
    "o",
    markersize=11,
    markerfacecolor="none",
    markeredgecolor=red,
    label="greedy",
)
ax.plot([], [], "--o", color=green, label="the most probable")
ax.legend(loc="lower center", bbox_to_anchor=(0.5, -0.17), ncols=3)
ax.set(
    xlim=(-0.35, 3.6),
    ylim=(4.3, -0.3),
    xticks=[1, 2, 3],
    xticklabels=["first token", "second", "third"],
    yticks=[],
)
ax.xaxis.tick_top()
ax.tick_params(length=0)
ax.grid(False)
for side in ax.spines.values():
    side.set_visible(False)
figure.savefig(HERE / "search.svg", metadata={"Date": None})
if len(sys.argv) > 1:
    figure.savefig(sys.argv[1])
