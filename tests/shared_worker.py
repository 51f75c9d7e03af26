"""What `test_streaming.py` runs to see processes share a stream.

`shared_worker.py SCENARIO MACHINES` forks a process a number of MACHINES, "2,1" for two
on the first machine and one on the second, and prints what each found, as a JSON list.
"""

import json
import os
import socket
import sys
import threading
import traceback
from pathlib import Path

from qwen_analog.bpe import BYTE_ORDER
from qwen_analog.jsonl import DataError
from qwen_analog.distributed import DistributedContext
from qwen_analog.streaming import SharedDataset, StreamingDataset, open_stream
from qwen_analog.tokenizer import TiktokenTokenizer


class Counting(TiktokenTokenizer):
    encoded = 0

    def encode(self, text, special=False):
        Counting.encoded += 1
        return super().encode(text, special)


def opened(context, path, fraction=0.0):
    tokenizer = Counting({token: rank for rank, token in enumerate(BYTE_ORDER)})
    dataset = StreamingDataset(
        open_stream([path]), tokenizer, 16, 3, fraction, buffer_size=7
    )
    return SharedDataset(dataset, context)


def take(shared, context, count):
    """This rank's of the next `count` sequences."""
    size = context.world_size
    sequences = shared.take(count // size, context.rank, size)
    return [
        [s.input_ids.tolist(), s.targets.tolist(), s.document_ids.tolist(), s.sources]
        for s in sequences
    ]


def steps(context):
    shared = opened(context, "a.jsonl")
    taken = [take(shared, context, 6) for _ in range(4)]
    return {"taken": taken, "state": shared.state_dict(), "encoded": Counting.encoded}


def resumed(context):
    shared = opened(context, "a.jsonl")
    shared.load_state_dict(json.loads(Path("state.json").read_text()))
    began = shared.state_dict()
    taken = [take(shared, context, 6) for _ in range(4)]
    return {"taken": taken, "began": began, "state": shared.state_dict()}


def held_out(context):
    shared = opened(context, "a.jsonl", 0.3)
    dataset = shared.held_out_dataset(4)
    return {
        "held out": [s.input_ids.tolist() for s in dataset.epoch()],
        "taken": [take(shared, context, 12)],
    }


def few(context):
    """One of two documents is held out, which the hash alone would not do."""
    shared = opened(context, "few.jsonl", 1e-9)
    dataset = shared.held_out_dataset(4)
    return {
        "held out": [s.sources for s in dataset.epoch()],
        "taken": [take(shared, context, 12)],
    }


def in_a_thread(context):
    """Sequences are read ahead while the main thread talks to the other processes."""
    shared, taken = opened(context, "a.jsonl"), []
    thread = threading.Thread(
        target=lambda: taken.extend(take(shared, context, 6) for _ in range(4))
    )
    thread.start()
    sums = [context.all_reduce_sum(context.rank) for _ in range(50)]
    thread.join()
    return {"taken": taken, "sums": sums[-1]}


def broken(context):
    shared = opened(context, "broken.jsonl")
    try:
        take(shared, context, 600)
    except DataError as error:
        return {"words": str(error)}


def nowhere(context):
    shared = opened(context, "a.jsonl")
    try:
        shared.load_state_dict({"epoch": 0, "document": 10**6, "offset": 3})
    except DataError as error:
        return {"words": str(error), "state": shared.state_dict()}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fork(work, rank, place):
    """Fork a process that does `work` and writes what it found."""
    if child := os.fork():
        return child
    os.environ.update({name: str(value) for name, value in place.items()})
    Counting.encoded = 0
    code = 1
    try:
        with DistributedContext() as context:
            found = work(context)
        Path(f"rank {rank}.json").write_text(json.dumps(found))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run(work, machines):
    world, children = sum(machines), []
    port = free_port()
    for machine, size in enumerate(machines):
        for local_rank in range(size):
            rank = sum(machines[:machine]) + local_rank
            place = dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=local_rank)
            place |= dict(LOCAL_WORLD_SIZE=size, MASTER_PORT=port)
            children.append(fork(work, rank, place | dict(MASTER_ADDR="127.0.0.1")))
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0] * world, codes
    return [json.loads(Path(f"rank {rank}.json").read_text()) for rank in range(world)]


if __name__ == "__main__":
    sizes = [int(size) for size in sys.argv[2].split(",")]
    print(json.dumps(run(globals()[sys.argv[1]], sizes)))
