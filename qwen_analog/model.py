"""The whole model: blocks, backbone, language-model head."""
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qwen_analog.attention import GQAttention
from qwen_analog.config import QwenConfig
from qwen_analog.kv_cache import KVCache
from qwen_analog.loss import linear_cross_entropy
from qwen_analog.mask import document_mask, document_positions
from qwen_analog.mlp import SwiGLU
from qwen_analog.norm import RMSNorm
from qwen_analog.rope import RotaryEmbedding

__all__ = ["DecoderLayer", "QwenModel", "QwenForCausalLM", "QwenConfig"]


class DecoderLayer(nn.Module):
    """Pre-norm block: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: QwenConfig, layer_idx: int):
        super().__init__()
        self.self_attn = GQAttention(config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
                                     config.head_dim, bias=config.attention_bias, layer_idx=layer_idx)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                mask: torch.Tensor | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """`x` [B, T, D] -> [B, T, D]; the other arguments go to `GQAttention`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class QwenModel(nn.Module):
    """Token embedding, `num_hidden_layers` blocks, final norm: ids [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope_theta)
        self.gradient_checkpointing = False

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None,
                mask: torch.Tensor | None = None, cache: KVCache | None = None) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        if position_ids is None:
            start = 0 if cache is None else cache.length
            position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
        cos, sin = self.rotary_emb(position_ids, x.dtype)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache)
        return self.norm(x)


class QwenForCausalLM(nn.Module):
    """Qwen2.5's architecture with its language-model head; `state_dict` keys are Hugging Face Qwen2's."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.model = QwenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices from N(0, initializer_range), biases 0, norms 1 (as Hugging Face initialises Qwen2)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                if not (module is self.lm_head and self.config.tie_word_embeddings):
                    module.weight.normal_(0.0, self.config.initializer_range)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor | None = None, *,
                position_ids: torch.Tensor | None = None, mask: torch.Tensor | None = None,
                document_ids: torch.Tensor | None = None, cache: KVCache | None = None,
                logits_to_keep: int = 0, reduction: str = "mean") -> torch.Tensor:
        """`input_ids` [B, T] int64 -> logits [B, T, V]; with `targets` [B, T] -> the loss instead, a float32 scalar.

        `targets[b, t]` is the token to predict after `input_ids[b, t]` (-100: none); the logits are then never held whole.
        `document_ids` [B, T] keeps packed documents apart (positions and attention); it takes the place of
        `position_ids` and `mask`. `logits_to_keep` n > 0 gives the last n positions only.
        """
        if document_ids is not None:
            if mask is not None or position_ids is not None or cache is not None:
                raise ValueError("document_ids sets mask and position_ids itself and does not go with a cache")
            mask, position_ids = document_mask(document_ids), document_positions(document_ids)
        hidden = self.model(input_ids, position_ids, mask, cache)
        if targets is not None:
            return linear_cross_entropy(hidden, self.lm_head.weight, targets, reduction=reduction)
        return self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty `KVCache` of this model's shape, dtype and device."""
        weight = self.model.embed_tokens.weight
        return KVCache(self.config.num_hidden_layers, batch_size, self.config.num_key_value_heads, self.config.head_dim,
                       max_length, dtype=weight.dtype, device=weight.device)

    def gradient_checkpointing_enable(self) -> None:
        """Keep only each block's input; compute the rest again in the backward pass (Chen et al. 2016)."""
        self.model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing = False

    def count_parameters(self) -> int:
        """Number of weights; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As `nn.Module.load_state_dict`; a tied model accepts files with or without `lm_head.weight`."""
        if self.config.tie_word_embeddings and "model.embed_tokens.weight" in state_dict:
            embedding, head = state_dict["model.embed_tokens.weight"], state_dict.get("lm_head.weight")
            if head is not None and not torch.equal(head, embedding):
                raise ValueError("lm_head.weight differs from model.embed_tokens.weight: these weights need tie_word_embeddings=False")
            state_dict = {**state_dict, "lm_head.weight": embedding}
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        return result
