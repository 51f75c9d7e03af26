"""Qwen2.5-style language models."""
from . import generate  # noqa: F401  it gives QwenForCausalLM its method
from .attention import GQAttention
from .config import PRESETS, QwenConfig
from .kv_cache import KVCache
from .mlp import SwiGLU
from .model import DecoderLayer, QwenForCausalLM, QwenModel
from .norm import RMSNorm
from .rope import RotaryEmbedding

__version__ = "0.1.0"
__all__ = ["DecoderLayer", "GQAttention", "KVCache", "PRESETS", "QwenConfig", "QwenForCausalLM", "QwenModel", "RMSNorm",
           "RotaryEmbedding", "SwiGLU"]
