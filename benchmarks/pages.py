"""Compare a decoding step over rows with one over pages: SmolLM2, paired, in turns.

    python benchmarks/pages.py [ROUNDS]

It prints the median milliseconds of both and the median of their ratios.
"""

import sys
import time
from statistics import median

import torch

import qwen_analog
from qwen_analog.engine import new_row_cache
from qwen_analog.pages import new_paged_cache, pages_for

CASES = (1, 300), (4, 300), (16, 100), (16, 300), (16, 1000), (16, 2000)


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


def main(rounds: int) -> None:
    model, _ = qwen_analog.load("smollm2", inference=True)
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


main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
