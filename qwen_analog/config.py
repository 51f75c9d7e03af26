"""The shape of a model, its presets and its parameter ledger."""
import json
from dataclasses import asdict, dataclass, fields
from importlib import resources

__all__ = ["QwenConfig", "PRESETS", "parameter_ledger"]


@dataclass
class QwenConfig:
    """Everything that fixes the model's shape, with Hugging Face's field names; the defaults are the card's.

    `head_dim=None` becomes `hidden_size // num_attention_heads`. Raises ValueError naming the field whose value is impossible.
    """

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int | None = None
    intermediate_size: int = 11008
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = True
    initializer_range: float = 0.02

    def __post_init__(self):
        counts = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                  "intermediate_size", "max_position_embeddings")
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        for name in ("tie_word_embeddings", "attention_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                                 f"{self.num_attention_heads}: set head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not isinstance(self.head_dim, int) or isinstance(self.head_dim, bool) or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be a positive even number, not {self.head_dim!r}")

    @classmethod
    def from_dict(cls, values: dict) -> "QwenConfig":
        """From a mapping of field names; an unknown name is a ValueError that names it."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"unknown model field {name!r}; known: {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "QwenConfig":
        """A named shape from `PRESETS`, with single fields overridden."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    def to_dict(self) -> dict:
        return asdict(self)


PRESETS: dict[str, dict] = json.loads(resources.files("qwen_analog").joinpath("presets.json").read_text(encoding="utf-8"))


def parameter_ledger(config: QwenConfig) -> dict[str, int]:
    """Weights by part, summed over layers: embedding, attention, mlp, norms, lm_head (0 where tied)."""
    D, F, h = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv, L = config.num_attention_heads * h, config.num_key_value_heads * h, config.num_hidden_layers
    bias = q + 2 * kv if config.attention_bias else 0
    return {"embedding": config.vocab_size * D, "attention": L * (D * q + 2 * D * kv + bias + q * D), "mlp": L * 3 * D * F,
            "norms": (2 * L + 1) * D, "lm_head": 0 if config.tie_word_embeddings else config.vocab_size * D}
