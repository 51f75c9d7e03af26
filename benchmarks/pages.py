"""Compare rows with pages: a decoding step, and 24 requests. SmolLM2, paired, in turns.

    python benchmarks/pages.py [ROUNDS]

It prints the medians of both and the median of their ratios: milliseconds of a step on
all cores, and seconds of the requests on one.
"""

import random
import sys
import time
from statistics import median

import torch

import qwen_analog
from qwen_analog.engine import Engine, new_row_cache
from qwen_analog.pages import new_paged_cache, pages_for
from qwen_analog.sampling import SamplingParams
from qwen_analog.scheduler import Request

CASES = (1, 300), (4, 300), (16, 100), (16, 300), (16, 1000), (16, 2000)
ROWS = dict(max_batch=4)
PAGES = dict(max_batch=16, kv_pages=64, page_size=8)  # as many places


def filled(model, rows: int, length: int):
    """Make caches whose rows hold `length` tokens: one of rows, one of pages."""
    by_row = new_row_cache(model, rows, length + 1)
    by_row.lengths = [length] * rows
    paged = new_paged_cache(model, rows, rows * pages_for(length + 1, 16))
    for start in range(0, length, 16):  # in turns, so that no row's pages are in order
        for row in range(rows):
            tokens = [row] * min(16, length - start)
            paged.reserve(row, tokens)
            paged.advance(row, len(tokens))
    return by_row, paged


@torch.inference_mode()
def step(model, cache, ids) -> float:
    """Return the milliseconds of a step that writes a token in every row."""
    begin = time.perf_counter()
    if hasattr(cache, "reserve"):
        for row in range(len(ids)):
            cache.reserve(row, [0])
    positions, mask = cache.begin(slice(0, len(ids)), 1)
    where = dict(position_ids=positions, mask=mask, cache=cache)
    model(ids, **where, logits_to_keep=1)
    return 1000 * (time.perf_counter() - begin)


def compare_steps(model, rounds: int) -> None:
    for rows, length in CASES:
        caches, ids = filled(model, rows, length), torch.zeros((rows, 1), dtype=int)
        pairs = [[step(model, cache, ids) for cache in caches] for _ in range(rounds)]
        by_row, paged = (median(times) for times in zip(*pairs[1:]))
        ratio = median(b / a for a, b in pairs[1:])
        print(
            f"{rows:2} rows of {length:4} tokens: rows {by_row:6.1f} ms,"
            f" pages {paged:6.1f} ms, {ratio:.2f} times as long",
            flush=True,
        )


def serve(model, tokenizer, **memory) -> float:
    """Return the processor's seconds for 24 requests, of the sizes in the book."""
    rng = random.Random(4)
    engine = Engine(model, tokenizer, max_context=128, **memory)
    engine.stop_ids = set()  # each answer has all of its tokens
    for _ in range(24):
        prompt = [rng.randrange(94) for _ in range(rng.choice([2, 9, 25, 40]))]
        size = rng.choice([6, 6, 20, 70])
        request = Request(prompt, size, SamplingParams(temperature=0))
        engine.add_request(request, deliver=lambda delta: None)
    begin = time.process_time()
    while engine.step():
        pass
    return time.process_time() - begin


def compare_requests(model, tokenizer, rounds: int) -> None:
    torch.set_num_threads(1)
    pairs = []
    for _ in range(rounds):
        pairs.append([serve(model, tokenizer, **memory) for memory in (ROWS, PAGES)])
    by_row, paged = (median(times) for times in zip(*pairs[1:]))
    ratio = median(b / a for a, b in pairs[1:])
    print(
        f"24 requests:            rows {by_row:6.1f} s,  pages {paged:6.1f} s,"
        f"  {ratio:.2f} times as long"
    )


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    model, tokenizer = qwen_analog.load("smollm2", inference=True)
    compare_steps(model, rounds)
    compare_requests(model, tokenizer, rounds)
