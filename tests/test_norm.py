"""RMSNorm beside Hugging Face's, and the ways in which it could be wrong."""

import pytest
import torch
import torch.nn.functional as F
from book import scramble_
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from qwen_analog.norm import RMSNorm

D = 64


def distances(candidate_class, dtype):
    """Largest difference from Hugging Face's module: (outputs, gradients)."""
    reference = scramble_(Qwen2RMSNorm(D, eps=1e-6)).to(dtype)
    candidate = candidate_class(D, eps=1e-6).to(dtype)
    candidate.load_state_dict(reference.state_dict())
    g = torch.Generator().manual_seed(1)
    outputs, gradients = [], []
    for scale in (3.0, 2e-3):  # eps counts for the small vectors only
        values = (scale * (torch.randn(32, D, generator=g) + 0.5)).to(dtype)
        upstream = torch.randn(32, D, generator=g).to(dtype)
        results = []
        for module in (reference, candidate):
            leaf = values.clone().requires_grad_()
            module.zero_grad()
            y = module(leaf)
            y.backward(upstream)
            # the gradient grows as 1 / scale: measure it in that unit
            gradient = torch.cat((leaf.grad.flatten() * scale, module.weight.grad))
            results.append((y.detach(), gradient))
        (y, gradient), (z, other) = results
        outputs.append((y - z).abs().max().item())
        gradients.append((gradient - other).abs().max().item())
    return max(outputs), max(gradients)


def agrees(candidate_class):
    return (
        max(distances(candidate_class, torch.float32)) < 1e-4
        and max(distances(candidate_class, torch.float64)) < 1e-5
        and distances(candidate_class, torch.bfloat16)[0] == 0
    )


def test_it_is_the_reference():
    assert agrees(RMSNorm)


def unit(x, eps):
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def no_weight(self, x):
    return unit(x, self.eps).to(x.dtype) + 0 * self.weight


def one_plus_weight(self, x):
    return (1 + self.weight) * unit(x, self.eps).to(x.dtype)


def layer_norm(self, x):
    return F.layer_norm(x, (D,), self.weight, None, self.eps)


def another_eps(self, x):
    return self.weight * unit(x, 1e-5).to(x.dtype)


def eps_outside_the_root(self, x):
    size = x.float().pow(2).mean(-1, keepdim=True).sqrt() + self.eps
    return self.weight * (x.float() / size).to(x.dtype)


def sum_not_mean(self, x):
    return self.weight * F.normalize(x.float(), dim=-1).to(x.dtype)


def scale_before_cast(self, x):
    return F.rms_norm(x, (D,), self.weight, self.eps)


def statistics_in_bf16(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def detached_statistics(self, x):
    square = x.detach().float().pow(2).mean(-1, keepdim=True)
    return self.weight * (x.float() * torch.rsqrt(square + self.eps)).to(x.dtype)


def mean_of_sizes(self, x):
    size = x.float().abs().mean(-1, keepdim=True) + self.eps
    return self.weight * (x.float() / size).to(x.dtype)


def one_size_for_all_tokens(self, x):
    size = torch.rsqrt(x.float().pow(2).mean() + self.eps)
    return self.weight * (x.float() * size).to(x.dtype)


MUTANTS = [
    mean_of_sizes,
    one_size_for_all_tokens,
    no_weight,
    one_plus_weight,
    layer_norm,
    another_eps,
    eps_outside_the_root,
    sum_not_mean,
    scale_before_cast,
    statistics_in_bf16,
    detached_statistics,
]


@pytest.mark.mutant
@pytest.mark.parametrize("forward", MUTANTS, ids=lambda f: f.__name__)
def test_a_mutant_is_noticed(forward, monkeypatch):
    monkeypatch.setattr(RMSNorm, "forward", forward)
    assert not agrees(RMSNorm)


def test_the_gradient_has_no_part_along_the_input():
    x = torch.randn(16, D, requires_grad=True)
    RMSNorm(D)(x).backward(torch.randn(16, D))
    assert F.cosine_similarity(x.grad, x, dim=-1).abs().max() < 1e-5
