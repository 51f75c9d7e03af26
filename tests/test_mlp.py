"""SwiGLU beside Hugging Face's, and the ways in which it could be wrong."""

import pytest
import torch
import torch.nn.functional as F
from book import scramble_
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from qwen_analog.mlp import SwiGLU

D, INNER = 24, 56


class SiLU(torch.nn.Module):
    """The reference's own, out of reach of a patched `F.silu`."""

    def forward(self, x, real=F.silu):
        return real(x)


def results(module, dtype):
    g = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(3, 5, D, generator=g).to(dtype) for _ in range(2))
    x.requires_grad_()
    y = module(x)
    y.backward(upstream)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def agrees():
    for dtype, bound in (
        (torch.float32, 1e-4),
        (torch.float64, 1e-5),
        (torch.bfloat16, 0),
    ):
        config = Qwen2Config(hidden_size=D, intermediate_size=INNER)
        reference = scramble_(Qwen2MLP(config)).to(dtype)
        reference.act_fn = SiLU()
        ours = SwiGLU(D, INNER).to(dtype)
        ours.load_state_dict(reference.state_dict())
        for a, b in zip(results(reference, dtype), results(ours, dtype), strict=True):
            if b is None or (a - b).abs().max() > bound * a.abs().max():
                return False
    return True


def test_it_is_the_reference():
    assert agrees()


MUTANTS = {
    "swapped": lambda m, x: m.down_proj(F.silu(m.up_proj(x)) * m.gate_proj(x)),
    "GELU": lambda m, x: m.down_proj(F.gelu(m.gate_proj(x)) * m.up_proj(x)),
    "tanh": lambda m, x: m.down_proj(
        F.gelu(m.gate_proj(x), approximate="tanh") * m.up_proj(x)
    ),
    "sigmoid": lambda m, x: m.down_proj(m.gate_proj(x).sigmoid() * m.up_proj(x)),
    "ReLU": lambda m, x: m.down_proj(F.relu(m.gate_proj(x)) * m.up_proj(x)),
    "no gate": lambda m, x: m.down_proj(F.silu(m.up_proj(x)) + 0 * m.gate_proj(x)),
    "sum": lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) + m.up_proj(x)),
    "late": lambda m, x: m.down_proj(F.silu(m.gate_proj(x) * m.up_proj(x))),
    "residual": lambda m, x: x + m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x)),
    "both": lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * F.silu(m.up_proj(x))),
    "twice": lambda m, x: m.down_proj(F.silu(F.silu(m.gate_proj(x))) * m.up_proj(x)),
    "bias": lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * (m.up_proj(x) + 0.5)),
}


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_noticed(mutant, monkeypatch):
    monkeypatch.setattr(SwiGLU, "forward", MUTANTS[mutant])
    assert not agrees()


@pytest.mark.mutant
def test_float32_inside_bfloat16_is_noticed(monkeypatch):
    real = SwiGLU.forward

    def wide(m, x):
        if x.dtype != torch.bfloat16:
            return real(m, x)
        product = F.silu(m.gate_proj(x).float()) * m.up_proj(x).float()
        return m.down_proj(product.to(x.dtype))

    monkeypatch.setattr(SwiGLU, "forward", wide)
    assert not agrees()
