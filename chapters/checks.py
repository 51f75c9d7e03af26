"""Checks of a small training program, for the appendix on symptoms: each asks what a
healthy program answers with yes, and returns None, or says what is wrong.

`part` holds the parts of the program, `text`, the tokens that it learns from, and
`steps`, the length of its schedule.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from book import hugging_face, scramble_


def vocabulary(part):
    return part.make_model().config.vocab_size


def batches(part):
    """Batches differ, and come from all of the file."""
    places = torch.arange(len(part.text))  # a text that says where it was read
    starts = torch.cat([part.next_batch(s, places)[0][:, 0] for s in range(40)])
    if len(starts.unique()) < 0.9 * len(starts):
        return f"{len(starts.unique())} different rows among {len(starts)}"
    width = (starts.max() - starts.min()).item() / len(part.text)
    if width < 0.5:
        return f"40 steps read {width:.1%} of the file"


def every_position(part):
    """A model that knows the second half of a row has half of the loss ln V."""
    V = vocabulary(part)

    def knows_the_second_half(inputs):
        logits = 20.0 * F.one_hot((inputs + 1) % V, V)
        logits[:, : inputs.shape[1] // 2] = 0
        return logits

    batch = part.next_batch(0, torch.arange(40 * V) % V)
    found = part.compute_loss(knows_the_second_half, *batch).item()
    if not abs(found - math.log(V) / 2) < 0.3:
        return f"loss {found:.2f} of a model that knows one half"


def first_loss(part):
    """A model that knows nothing has a loss of ln V."""
    torch.manual_seed(0)
    model = part.make_model()
    wanted = math.log(model.config.vocab_size)
    found = part.compute_loss(model, *part.next_batch(0)).item()
    if abs(found - wanted) > 0.3:
        return f"first loss {found:.2f}, not {wanted:.2f}"


def sampler(part):
    """A thousand draws follow the softmax at the temperature that was asked for."""
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([part.choose(logits, generator) for _ in range(1000)])
    found = drawn.bincount(minlength=4) / 1000
    apart = (found - (logits / 0.3).softmax(-1)).abs().max().item()
    if not apart < 0.05:
        return f"draws differ from the softmax by {apart:.2f}"


def documents(part):
    """Two documents in one row give the logits of each alone."""
    torch.manual_seed(0)
    model = scramble_(part.make_model())
    ids = torch.arange(12)[None]
    packed = model(ids, document_ids=torch.tensor([[0] * 5 + [1] * 7]))
    apart = (packed[:, 5:] - model(ids[:, 5:])).abs().max().item()
    if not apart < 1e-3:
        return f"a document's logits change by {apart:.2g} beside another"


def cache(part):
    """Token by token with the cache gives the logits of the whole."""
    torch.manual_seed(0)
    model = scramble_(part.make_model())
    ids = torch.arange(12)[None]
    memory = model.new_cache(1, 12)
    steps = [model(ids[:, t : t + 1], cache=memory) for t in range(12)]
    apart = (torch.cat(steps, dim=1) - model(ids)).abs().max().item()
    if not apart < 1e-3:
        return f"cached logits differ from the whole by {apart:.2g}"


def reference_gradient(part):
    """On scrambled weights, gradients are those of Hugging Face's Qwen2."""
    ours = scramble_(part.make_model())
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
    for size, bound in ((1e6, 1.01), (math.nan, 0.01)):
        before = layer.weight.detach().clone()
        (layer(torch.ones(4)).sum() * size).backward()
        part.update(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
        moved = (layer.weight.detach() - before).norm().item()
        if not moved <= bound:
            return f"a gradient of size {size:g} moves weights by {moved:.2g}"


def step_at(part, scale):
    """Return a weight before and after a step at `scale` times the full rate, behind
    a step at rate zero.
    """
    torch.manual_seed(0)
    model = part.make_model()
    optimizer = part.make_optimizer(model)
    full = max(part.rate(step) for step in range(part.steps))
    for step, factor in enumerate((0, scale)):
        for group in optimizer.param_groups:
            group["lr"] = factor * full
        before = model.lm_head.weight.detach().clone()
        part.compute_loss(model, *part.next_batch(step)).backward()
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
