"""What Prometheus finds at /metrics."""

import contextlib
import http.client
import json
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_helpers import (
    MODEL,
    NAME,
    TOKENIZER,
    client,
    end_servers,
    endless,
    first_row,
    idle,
    post,
    serving,
)

from qwen_analog.engine import AsyncEngine


def read(port):
    """The samples by their names and labels."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        text = response.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.name.startswith("qwen_analog_")
        for sample in family.samples:
            name = sample.name.removeprefix("qwen_analog_")
            found[name, *sample.labels.values()] = sample.value
    return found


def ended(port, reason):
    return read(port).get(("answers_total", reason), 0)


@pytest.mark.parametrize("kv_pages", [None, 60])
def test_what_is_counted(kv_pages, monkeypatch):
    engine = endless(max_batch=2, max_context=400, kv_pages=kv_pages)
    write, released = engine.runner.write, threading.Event()

    def slowly(sequences):  # long answers last until they are let go
        released.wait(0.2 if sequences[0].request.max_tokens == 300 else 0)
        return write(sequences)

    monkeypatch.setattr(engine.runner, "write", slowly)
    with serving(engine) as port:
        assert ended(port, "length") == 0
        body = {"model": NAME, "prompt": [[1, 2, 3], [4]], "max_tokens": 6}
        assert post(port, body)[0] == 200
        create = client(port).completions.create
        list(create(model=NAME, prompt=[1], max_tokens=4, stream=True))
        found = read(port)
        assert found["answers_total", "length"] == 3
        assert found["prompt_tokens_total",] == 3 + 1 + 1
        assert found["completion_tokens_total",] == 6 + 6 + 4
        assert found["time_to_first_token_seconds_count",] == 3
        assert 0 < found["time_to_first_token_seconds_sum",] < 60
        assert found["tokens_per_second_count",] <= 3
        assert found["requests_running",] == found["requests_waiting",] == 0
        assert found["cache_tokens",] == found.get(("pages_used",), 0) == 0
        assert found.get(("pages",)) == kv_pages
        # one has the row, one waits, and both go
        streams = [
            create(model=NAME, prompt=[i] * 30, max_tokens=300, stream=True)
            for i in range(3)
        ]
        next(streams[0])
        found = read(port)
        while (found["requests_running",], found["requests_waiting",]) != (2, 1):
            time.sleep(0.005)
            found = read(port)
        assert found["cache_tokens",] > 0
        if kv_pages:
            assert 4 <= found["pages_used",] <= 60
        for stream in streams:
            stream.close()
        released.set()
        idle(engine)
        while ended(port, "abort") < 3:
            time.sleep(0.005)
        assert ended(port, "length") == 3


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_fail_are_counted(stream, monkeypatch):
    engine = AsyncEngine(MODEL, TOKENIZER, max_batch=1, max_context=64)
    monkeypatch.setattr(engine.runner, "write", None)
    with serving(engine) as port:
        body = {"model": NAME, "prompt": [1], "max_tokens": 6, "stream": stream}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            head = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), head)
            assert b"error" in connection.getresponse().read()
        assert ended(port, "error") == 1
        assert read(port)["completion_tokens_total",] == 0
        assert read(port)["time_to_first_token_seconds_count",] == 0
