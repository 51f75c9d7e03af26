"""Checks of a small training program, for the appendix on symptoms: each asks what a
healthy program answers with yes, and returns None, or says what is wrong.

`program` holds its parts, `tokens`, the text that it learns from, and `steps`, the
length of its schedule.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from book import hugging_face, scramble_


def vocabulary(program):
    return program.make_model().config.vocab_size


def batches(program):
    """Batches differ, and come from all of the file."""
    places = torch.arange(len(program.tokens))  # a text that says where it was read
    starts = torch.cat([program.next_batch(s, places)[0][:, 0] for s in range(40)])
    if len(starts.unique()) < 0.9 * len(starts):
        return f"{len(starts.unique())} different rows among {len(starts)}"
    width = (starts.max() - starts.min()).item() / len(program.tokens)
    if width < 0.5:
        return f"40 steps read {width:.1%} of the file"


def every_position(program):
    """A model that knows half of each row has half of the loss ln V."""
    V = vocabulary(program)

    def knows_the_second_half(inputs):
        logits = 20.0 * F.one_hot((inputs + 1) % V, V)
        logits[:, : inputs.shape[1] // 2] = 0
        return logits

    batch = program.next_batch(0, torch.arange(40 * V) % V)
    found = program.compute_loss(knows_the_second_half, *batch).item()
    if not abs(found - math.log(V) / 2) < 0.3:
        return f"loss {found:.2f} of a model that knows one half"


def first_loss(program):
    """A model that knows nothing has a loss of ln V."""
    torch.manual_seed(0)
    model = program.make_model()
    wanted = math.log(model.config.vocab_size)
    found = program.compute_loss(model, *program.next_batch(0)).item()
    if abs(found - wanted) > 0.3:
        return f"first loss {found:.2f}, not {wanted:.2f}"


def sampler(program):
    """A thousand draws follow the softmax at the given temperature."""
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([program.choose(logits, generator) for _ in range(1000)])
    found = drawn.bincount(minlength=4) / 1000
    apart = (found - (logits / 0.3).softmax(-1)).abs().max().item()
    if not apart < 0.05:
        return f"draws differ from the softmax by {apart:.2f}"


def documents(program):
    """Two documents in one row give the logits of each alone."""
    torch.manual_seed(0)
    model = scramble_(program.make_model())
    ids = torch.arange(12)[None]
    packed = model(ids, document_ids=torch.tensor([[0] * 5 + [1] * 7]))
    apart = (packed[:, 5:] - model(ids[:, 5:])).abs().max().item()
    if not apart < 1e-3:
        return f"a document's logits change by {apart:.2g} beside another"


def cache(program):
    """Token by token with the cache gives the logits of the whole."""
    torch.manual_seed(0)
    model = scramble_(program.make_model())
    ids = torch.arange(12)[None]
    memory = model.new_cache(1, 12)
    steps = [model(ids[:, t : t + 1], cache=memory) for t in range(12)]
    apart = (torch.cat(steps, dim=1) - model(ids)).abs().max().item()
    if not apart < 1e-3:
        return f"cached logits differ from the whole by {apart:.2g}"


def reference(program):
    """On scrambled weights, logits are those of Hugging Face's Qwen2."""
    ours = scramble_(program.make_model())
    theirs = hugging_face(ours.config)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.arange(20)[None]
    apart = (ours(ids) - theirs(ids).logits).abs().max().item()
    if not apart < 1e-3:
        return f"logits differ from the reference by {apart:.2g}"


def reference_gradient(program):
    """On scrambled weights, gradients are those of Hugging Face's Qwen2."""
    ours = scramble_(program.make_model())
    theirs = hugging_face(ours.config)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.arange(20)[None]
    gradients = []
    for model, logits in ((ours, ours(ids)), (theirs, theirs(ids).logits)):
        logits.logsumexp(-1).sum().backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    found, wanted = gradients
    apart = (found - wanted).abs().max() / wanted.abs().max()
    if not apart < 1e-3:
        return f"the embedding's gradient differs by {apart:.1%}"


def fresh_gradient(program):
    """A step's gradient is that of its batch alone."""
    torch.manual_seed(0)
    model = program.make_model()
    optimizer = program.make_optimizer(model)
    for step in (0, 1):
        program.compute_loss(model, *program.next_batch(step)).backward()
        kept = model.lm_head.weight.grad.clone()
        if step == 0:
            program.update(model, optimizer)
    model.zero_grad()
    program.compute_loss(model, *program.next_batch(1)).backward()
    if not torch.allclose(kept, model.lm_head.weight.grad, atol=1e-6):
        return "the second gradient holds the first"


def clipping(program):
    """A huge gradient moves weights by the clipped norm, nan by nothing."""
    layer = nn.Linear(4, 4)
    for size, bound in ((1e6, 1.01), (math.nan, 0.01)):
        before = layer.weight.detach().clone()
        (layer(torch.ones(4)).sum() * size).backward()
        program.update(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
        moved = (layer.weight.detach() - before).norm().item()
        if not moved <= bound:
            return f"a gradient of size {size:g} moves weights by {moved:.2g}"


def step_at(program, scale):
    """Return a weight before and after a step at `scale` times the full rate, behind
    a step at rate zero.
    """
    torch.manual_seed(0)
    model = program.make_model()
    optimizer = program.make_optimizer(model)
    full = max(program.rate(step) for step in range(program.steps))
    for step, factor in enumerate((0, scale)):
        for group in optimizer.param_groups:
            group["lr"] = factor * full
        before = model.lm_head.weight.detach().clone()
        program.compute_loss(model, *program.next_batch(step)).backward()
        program.update(model, optimizer)
    return before, model.lm_head.weight.detach()


def update_size(program):
    """A step at full rate moves weights by hundredths or tenths of them."""
    before, after = step_at(program, 1)
    moved = (after - before).std() / before.std()
    if not 0.01 < moved < 1:
        return f"one step moves weights by {moved:.2g} times their size"


def small_steps(program):
    """At a thousandth of the rate, most weights still move."""
    before, after = step_at(program, 1e-3)
    moved = (after != before).float().mean()
    if moved < 0.5:
        return f"a small step moves {moved:.0%} of the weights"


def schedule(program):
    """The rate rises, peaks early, and is not zero before the end."""
    rates = [program.rate(step) for step in range(program.steps)]
    if max(rates) <= 0:
        return "the rate is never above 0"
    peak = rates.index(max(rates))
    if not 2 < peak < program.steps // 2:
        return f"the rate peaks at step {peak}"
    if rates[int(0.9 * program.steps)] == 0:
        return f"the rate is 0 from step {rates.index(0)} on"


def one_batch(program):
    """Thirty steps on one batch, at the highest rate, halve its loss at least."""
    torch.manual_seed(0)
    model = program.make_model()
    optimizer = program.make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = max(program.rate(step) for step in range(program.steps))
    inputs, targets = program.next_batch(0)
    losses = []
    for _ in range(30):
        loss = program.compute_loss(model, inputs, targets)
        loss.backward()
        program.update(model, optimizer)
        losses.append(loss.item())
    if not losses[-1] < 0.5 * losses[0]:
        return f"one batch: {losses[0]:.2f} to {losses[-1]:.2f} in 30 steps"


OTHERS = [schedule, batches, sampler, every_position, first_loss, documents, cache]
OTHERS += [reference, reference_gradient, fresh_gradient, clipping, update_size]
OTHERS += [small_steps, one_batch]  # from cheap to dear
