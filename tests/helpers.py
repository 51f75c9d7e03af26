"""What several test files share: a model, its tokenizer, a refused command."""

from pathlib import Path

from book import scramble_
from qwen_analog.cli import main
from qwen_analog.config import QwenConfig
from qwen_analog.model import QwenForCausalLM
from qwen_analog.bpe import BYTE_ORDER
from qwen_analog.tokenizer import TiktokenTokenizer

ROOT = Path(__file__).resolve().parents[1]
BYTES = TiktokenTokenizer({token: rank for rank, token in enumerate(BYTE_ORDER)})
SMALL = QwenConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    rope_theta=1e4,
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
