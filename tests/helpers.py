"""What several test files share: a model, its tokenizer, a refused command."""

import os
from pathlib import Path

import torch
from book import scramble_
from qwen_analog.cli import main
from qwen_analog.config import QwenConfig
from qwen_analog.model import QwenForCausalLM
from qwen_analog.bpe import BYTE_ORDER
from qwen_analog.tokenizer import TiktokenTokenizer

ROOT = Path(__file__).resolve().parents[1]
BYTES = TiktokenTokenizer({token: rank for rank, token in enumerate(BYTE_ORDER)})
SHAPE = dict(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    rope_theta=1e4,
)
SMALL = QwenConfig(**SHAPE)
# what a sampler may be told, by every function that draws
SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "seed",
)


def small_model() -> QwenForCausalLM:
    """A model of 300 tokens and 64 positions with scrambled weights."""
    return scramble_(QwenForCausalLM(SMALL)).eval()


def refused(capsys, *argv) -> str:
    """The one line with which the command `qwen-analog` refuses."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("qwen-analog: error: "), said.err
    assert said.err.count("\n") == 1, said.err
    return said.err


def up_to_rounding(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for what another processor's kernels round otherwise."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def same(a, b, equal=torch.equal) -> bool:
    """Equal to the bit, in type too; of dicts and lists, all that they hold. `equal`
    compares two tensors.
    """
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], equal) for k in a)
    return (
        type(a) is type(b)
        and len(a) == len(b)
        and all(same(x, y, equal) for x, y in zip(a, b))
        if isinstance(a, (list, tuple))
        else a == b
    )


class Bomb:
    """Makes a directory, where a file that holds it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("the_bomb_went_off",)
