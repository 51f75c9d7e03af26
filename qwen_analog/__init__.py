"""Qwen2.5-style language models."""

import os
import signal
import sys
import threading


def _is_the_program() -> bool:
    """Whether this process was started as one of the package's commands."""
    words = sys.orig_argv
    module = any(
        a == "-m" and b.partition(".")[0] == __name__ for a, b in zip(words, words[1:])
    )
    return module or os.path.basename(sys.argv[0] if sys.argv else "") == "qwen-analog"


if _is_the_program() and threading.current_thread() is threading.main_thread():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # what follows takes seconds, and Ctrl-C in it would show where in torch it came
        _quiet = lambda *_: os._exit(130)
        _quiet.quiet = True
        signal.signal(signal.SIGINT, _quiet)

from . import generate  # noqa: F401  it gives QwenForCausalLM its method
from .attention import GQAttention
from .config import PRESETS, QwenConfig
from .kv_cache import KVCache
from .mlp import SwiGLU
from .model import DecoderLayer, QwenForCausalLM, QwenModel
from .norm import RMSNorm
from .rope import RotaryEmbedding

__version__ = "0.1.0"
__all__ = [
    "DecoderLayer",
    "GQAttention",
    "KVCache",
    "PRESETS",
    "QwenConfig",
    "QwenForCausalLM",
    "QwenModel",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
]
