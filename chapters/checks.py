"""Checks of a small training program, for the appendix on symptoms: each asks what a
healthy program answers with yes, and returns None, or says what is wrong.

`part` holds the parts of the program, `text`, the tokens that it learns from, and
`steps`, the length of its schedule.
"""

import math

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from book import scramble_


def batches(part):
    """Batches differ, and come from all of the file."""
    places = torch.arange(len(part.text))  # a text that says where it was read
    starts = torch.cat([part.next_batch(s, places)[0][:, 0] for s in range(40)])
    if len(starts.unique()) < 0.9 * len(starts):
        return f"{len(starts.unique())} different rows among {len(starts)}"
    width = (starts.max() - starts.min()).item() / len(part.text)
    if width < 0.5:
        return f"40 steps read {width:.1%} of the file"


def sampler(part):
    """A thousand draws follow the softmax at the temperature that was asked for."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([part.choose(logits, generator) for _ in range(1000)])
    found = drawn.bincount(minlength=4) / 1000
    apart = (found - (logits / 0.5).softmax(-1)).abs().max().item()
    if not apart < 0.05:
        return f"draws differ from the softmax by {apart:.2f}"


def documents(part):
    """Two documents in one row give the logits of each alone."""
    torch.manual_seed(0)
    model = scramble_(part.make_model())
    ids = torch.arange(10, 22)[None]
    packed = model(ids, document_ids=torch.tensor([[0] * 5 + [1] * 7]))
    apart = (packed[:, 5:] - model(ids[:, 5:])).abs().max().item()
    if not apart < 1e-3:
        return f"a document's logits change by {apart:.2g} beside another"


def cache(part):
    """Token by token with the cache gives the logits of the whole."""
    torch.manual_seed(0)
    model = scramble_(part.make_model())
    ids = torch.arange(40, 52)[None]
    memory = model.new_cache(1, 12)
    steps = [model(ids[:, t : t + 1], cache=memory) for t in range(12)]
    apart = (torch.cat(steps, dim=1) - model(ids)).abs().max().item()
    if not apart < 1e-3:
        return f"cached logits differ from the whole by {apart:.2g}"


def reference(part):
    """On scrambled weights, logits and gradients are those of Hugging Face's Qwen2."""
    torch.manual_seed(0)
    model = scramble_(part.make_model())
    c = model.config
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads"
        " num_key_value_heads intermediate_size rope_theta rms_norm_eps"
        " tie_word_embeddings"
    )
    same = {name: getattr(c, name) for name in names.split()}
    theirs = Qwen2ForCausalLM(Qwen2Config(**same, attn_implementation="eager"))
    theirs.load_state_dict(model.state_dict(), strict=False)
    ids = torch.arange(40, 60)[None]
    logits, wanted = model(ids), theirs(ids).logits
    apart = (logits - wanted).abs().max().item()
    if not apart < 1e-3:
        return f"logits differ from the reference by {apart:.2g}"
    logits.logsumexp(-1).sum().backward()
    wanted.logsumexp(-1).sum().backward()
    ours, reference = model.model.embed_tokens.weight, theirs.model.embed_tokens.weight
    apart = (ours.grad - reference.grad).abs().max() / reference.grad.abs().max()
    if not apart < 1e-3:
        return f"the embedding's gradient differs by {apart:.1%}"


def fresh_gradient(part):
    """A step's gradient is that of its batch alone."""
    torch.manual_seed(0)
    model = part.make_model()
    optimizer = part.make_optimizer(model)
    for step in (0, 1):
        part.compute_loss(model, *part.next_batch(step)).backward()
        kept = model.lm_head.weight.grad.clone()
        if step == 0:
            part.update(model, optimizer)
    model.zero_grad()
    part.compute_loss(model, *part.next_batch(1)).backward()
    if not torch.allclose(kept, model.lm_head.weight.grad, atol=1e-6):
        return "the second gradient holds the first"


def clipping(part):
    """A gradient of any size moves the weights by at most the clipped norm; one that is
    not finite moves nothing.
    """
    layer = nn.Linear(4, 4)
    for size, bound in ((1e6, 1.001), (math.nan, 0.0)):
        before = layer.weight.detach().clone()
        (layer(torch.ones(4)).sum() * size).backward()
        part.update(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
        moved = (layer.weight.detach() - before).norm().item()
        if not moved <= bound:
            return f"a gradient of size {size:g} moves weights by {moved:.2g}"


def step_at(part, scale):
    """Return a weight before and after one step at `scale` times the full rate."""
    torch.manual_seed(0)
    model = part.make_model()
    optimizer = part.make_optimizer(model)
    before = model.lm_head.weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = scale * max(part.rate(step) for step in range(part.steps))
    part.compute_loss(model, *part.next_batch(0)).backward()
    part.update(model, optimizer)
    return before, model.lm_head.weight.detach()


def update_size(part):
    """A step at full rate moves a weight by some hundredths of its size, or tenths."""
    before, after = step_at(part, 1)
    moved = (after - before).std() / before.std()
    if not 0.01 < moved < 1:
        return f"one step moves weights by {moved:.1g} of their size"


def small_steps(part):
    """At a thousandth of the rate, most weights still move."""
    before, after = step_at(part, 1e-3)
    moved = (after != before).float().mean()
    if moved < 0.5:
        return f"a small step moves {moved:.0%} of the weights"


def schedule(part):
    """The rate rises, peaks early, and is not zero before the end."""
    rates = [part.rate(step) for step in range(part.steps)]
    peak = rates.index(max(rates))
    if not 2 < peak < part.steps // 2:
        return f"the rate peaks at step {peak}"
    if rates[int(0.9 * part.steps)] == 0:
        return f"the rate is 0 from step {rates.index(0)} on"


def one_batch(part):
    """Thirty steps on one batch must bring its loss down by half."""
    torch.manual_seed(0)
    model = part.make_model()
    optimizer = part.make_optimizer(model)
    inputs, targets = part.next_batch(0)
    losses = []
    for _ in range(30):
        loss = part.compute_loss(model, inputs, targets)
        loss.backward()
        part.update(model, optimizer)
        losses.append(loss.item())
    if not losses[-1] < 0.55 * losses[0]:
        return f"one batch: {losses[0]:.2f} to {losses[-1]:.2f} in 30 steps"
