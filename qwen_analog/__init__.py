"""Qwen2.5-style language models: build one, pretrain it, load it, let it write.

Nothing heavy is imported until a name is used.
"""

import importlib
import importlib.util
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attention import GQAttention
    from .config import PRESETS, QwenConfig
    from .kv_cache import KVCache
    from .loading import load
    from .mlp import SwiGLU
    from .model import DecoderLayer, QwenForCausalLM, QwenModel
    from .norm import RMSNorm
    from .rope import RotaryEmbedding

__version__ = "0.2.0"

_MODULE_OF = {
    "DecoderLayer": "model",
    "GQAttention": "attention",
    "KVCache": "kv_cache",
    "PRESETS": "config",
    "QwenConfig": "config",
    "QwenForCausalLM": "model",
    "QwenModel": "model",
    "RMSNorm": "norm",
    "RotaryEmbedding": "rope",
    "SwiGLU": "mlp",
    "load": "loading",
}
__all__ = [*_MODULE_OF]


def __getattr__(name: str):
    """Import a public name, or a module of the package, when it is first used."""
    if name in _MODULE_OF:
        module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
        return getattr(module, name)
    path = f"{__name__}.{name}"
    if not name.startswith("_") and importlib.util.find_spec(path):
        return importlib.import_module(path)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_the_program() -> bool:
    """Whether this process was started as one of the package's commands."""
    words = sys.orig_argv
    module = any(
        word == "-m" and name.partition(".")[0] == __name__
        for word, name in zip(words, words[1:])
    )
    return module or os.path.basename(sys.argv[0] if sys.argv else "") == "qwen-analog"


class _EndQuietly:
    """Ctrl-C while libraries are imported, which takes seconds: the program ends."""

    quiet = True

    def __call__(self, *_) -> None:
        os._exit(130)


if _is_the_program() and threading.current_thread() is threading.main_thread():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _EndQuietly())
