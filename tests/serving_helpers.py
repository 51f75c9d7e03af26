"""What tests of the engine, protocol and server share: a tiny model, a model
that writes a script, requests, and servers in threads.
"""

import contextlib
import dataclasses
import http.client
import json
import logging
import random
import socket
import threading
import time

import openai
import pytest
import torch
from book import scramble_
from helpers import BYTES as TOKENIZER, SHAPE

from qwen_analog import QwenConfig, QwenForCausalLM
from qwen_analog.engine import AsyncEngine
from qwen_analog.generate import generate
from qwen_analog.sampling import SamplingParams
from qwen_analog.scheduler import Request
from qwen_analog.server import build_app, build_server


EOS = TOKENIZER.eos_token_id


CONFIG = QwenConfig(
    **{
        **SHAPE,
        "vocab_size": 288,
        "intermediate_size": 64,
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
    }
)


MODEL = scramble_(QwenForCausalLM(CONFIG)).eval()


NAME = "tiny"


class Log:
    """What the server has written into its log, stack traces included."""

    def __init__(self):
        self.lines = []

    @property
    def text(self):
        return "\n".join(self.lines)


@pytest.fixture(name="log")
def log_fixture(monkeypatch):
    found, handle = Log(), logging.Logger.callHandlers

    def keep(logger, record):
        found.lines.append(logging.Formatter().format(record))
        handle(logger, record)

    monkeypatch.setattr(logging.Logger, "callHandlers", keep)
    return found


class Scripted(QwenForCausalLM):
    """Writes `script`, token i at position i, and logits of nan where the script says
    None; computes as much as the others.
    """

    def __init__(self, script):
        super().__init__(CONFIG)
        self.script = script

    def forward(self, input_ids, *, position_ids, **rest):
        logits = torch.zeros_like(
            super().forward(input_ids, position_ids=position_ids, **rest)
        )
        for row, position in enumerate(position_ids[:, -1].tolist()):
            token = self.script[(position + 1) % len(self.script)]
            if token is None:
                logits[row] = torch.nan
            else:
                logits[row, :, token] = 30
        return logits


def spell(text, prompt=1):
    """A script that writes `text` after a prompt of `prompt` tokens, and ends."""
    return [0] * prompt + TOKENIZER.encode(text) + [EOS]


def new_request(prompt, max_tokens=16, *, stop=(), logprobs=None, **params):
    """A `Request` whose `SamplingParams` are `params`."""
    return Request(prompt, max_tokens, SamplingParams(**params), stop, logprobs)


def requests(number=16, seed=4):
    """Prompts and answers of different lengths, settings of every kind."""
    rng = random.Random(seed)
    settings = [
        dict(temperature=0),
        dict(temperature=1.0),
        dict(temperature=0.8, top_k=20),
        dict(temperature=1.3, top_p=0.9),
        dict(temperature=0, repetition_penalty=1.3),
        dict(temperature=2.0, min_p=0.05),
    ]
    return [
        new_request(
            [rng.randrange(94) for _ in range(rng.choice([1, 3, 9, 30]))],
            rng.choice([1, 4, 12, 25]),
            seed=100 + i,
            logprobs=0,
            **settings[i % len(settings)],
        )
        for i in range(number)
    ]


def alone(request, model=MODEL):
    """Token ids that `generate` writes for the request."""
    options = dataclasses.asdict(request.params)
    ids = torch.tensor([request.prompt])
    written = generate(
        model,
        ids,
        request.max_tokens,
        eos_token_id=[EOS, EOS + 2],
        valid_vocab_size=TOKENIZER.vocab_size,
        **options,
    )
    return written[0, ids.shape[1] :].tolist()


def together(engine, wanted, every=3):
    """Token ids that a stepped engine writes for `wanted`, of which one more is added
    at each `every`-th step.
    """
    written = [[] for _ in wanted]
    todo, steps = list(enumerate(wanted)), 0
    while True:
        if todo and steps % every == 0:
            index, request = todo.pop(0)

            def deliver(delta, index=index):
                assert delta.finish_reason != "error", delta.text
                written[index] += [token for token, _, _ in delta.logprobs]

            engine.add_request(request, deliver=deliver)
        if engine.step() is None and not todo:
            return written
        steps += 1


def answers(engine, *wanted):
    """All deltas of each of the requests, on a stepped engine."""
    found = [[] for _ in wanted]
    engine.add_request(*wanted, deliver=lambda delta: found[delta.index].append(delta))
    while engine.step():
        pass
    return found


def endless(**options):
    """An engine whose answers end at max_tokens only."""
    engine = AsyncEngine(MODEL, TOKENIZER, **options)
    engine.stop_ids = set()
    return engine


def text_of(deltas):
    return "".join(delta.text for delta in deltas), deltas[-1].finish_reason


@contextlib.contextmanager
def running(server):
    """Run a server in a thread; its port."""
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive() and not server.engine.running


@contextlib.contextmanager
def serving(
    engine, grace_seconds=0, request_seconds=15, max_connections=512, **options
):
    """Serve at a free port of the loopback; `options` are those of `build_app`."""
    server = build_server(
        build_app(engine, NAME, **options),
        engine,
        grace_seconds=grace_seconds,
        request_seconds=request_seconds,
        max_connections=max_connections,
    )
    with running(server) as port:
        yield port


def client(port, kind=openai.OpenAI, **options):
    return kind(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key="none",
        **{"max_retries": 0, **options},
    )


def post(port, body, path="/v1/completions", **headers):
    """(status, JSON, headers) of a request made by hand."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request(
            "POST",
            path,
            body if isinstance(body, bytes) else json.dumps(body),
            {"Content-Type": "application/json", **headers},
        )
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers


@pytest.fixture(scope="module", name="tiny")
def tiny_fixture():
    """The port of a server of the tiny model, and its engine."""
    engine = AsyncEngine(
        MODEL, TOKENIZER, max_batch=8, max_context=400, prefill_chunk=16
    )
    with serving(engine) as port:
        yield port, engine


def idle(engine):
    """Wait until every row is free: a server that keeps them runs into the test's time
    limit.
    """
    while any(engine.scheduler.rows) or engine.scheduler.waiting:
        time.sleep(0.005)


def first_row(engine):
    """What the first row works on, once it works."""
    while engine.scheduler.rows[0] is None:
        time.sleep(0.005)
    return engine.scheduler.rows[0]


USER = [{"role": "user", "content": "x"}]


def send(port, data, wait=20):
    """All that comes back for `data` until the connection is closed."""
    received = b""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=wait) as connection,
        contextlib.suppress(ConnectionResetError),
    ):
        connection.sendall(data)
        while part := connection.recv(65536):
            received += part
    return received


def head(*lines, method="POST /v1/completions", host="localhost"):
    return "\r\n".join(
        [
            f"{method} HTTP/1.1",
            f"Host: {host}",
            "Content-Type: application/json",
            "Connection: close",
            *lines,
            "",
            "",
        ]
    ).encode()


SMALL = json.dumps({"model": NAME, "prompt": [1], "max_tokens": 2}).encode()


def status_of(response):
    """Status of a response with an error object, which must be whole."""
    first, _, rest = response.partition(b"\r\n")
    error = json.loads(rest.partition(b"\r\n\r\n")[2])["error"]
    assert (
        set(error) == {"message", "type", "param", "code"}
        and "\n" not in error["message"]
    )
    return int(first.split()[1])


_SERVERS = {}


@contextlib.contextmanager
def serving_once(**options):
    """A server with these options that lives as long as the tests: they do not change
    it.
    """
    key = repr(sorted(options.items()))
    if key not in _SERVERS:
        stack = contextlib.ExitStack()
        _SERVERS[key] = (
            stack,
            stack.enter_context(
                serving(
                    AsyncEngine(MODEL, TOKENIZER, max_batch=2, max_context=64),
                    **options,
                )
            ),
        )
    yield _SERVERS[key][1]


@pytest.fixture(scope="module", autouse=True)
def end_servers():
    yield
    for stack, _ in _SERVERS.values():
        stack.close()
