"""Every mistake of a command is one line that names its flag or file, every failure
has its exit code, nothing is lost.
"""

import errno
import importlib
import io
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from helpers import BYTES, ROOT, refused
from qwen_analog import cli, commands
from qwen_analog.cli import main
from qwen_analog.hf import save_pretrained


@pytest.mark.parametrize(
    "command, flag, values",
    [
        (["generate", "x"], "--max-new-tokens", ["-1", "1.5", "nan", "1" * 30]),
        (["generate", "x"], "--temperature", ["nan", "inf", "-1", "hot"]),
        (["generate", "x"], "--top-k", ["0", "-3", "inf"]),
        (["generate", "x"], "--top-p", ["0", "1.5", "nan"]),
        (["generate", "x"], "--min-p", ["-0.1", "2", "nan"]),
        (["generate", "x"], "--repetition-penalty", ["0", "-1", "inf", "nan"]),
        (["generate", "x"], "--seed", ["-1", "nan", "1" * 30]),
        (["eval"], "--context", ["0", "-1", "nan"]),
        (["eval"], "--stride", ["0", "-1", "1e3"]),
        (["eval"], "--heldout-fraction", ["0", "-0.1", "1.5", "nan", "inf"]),
        (["plan"], "--gpus", ["0", "-1", "nan", "1" * 30]),
        (["plan"], "--gpus-per-node", ["0", "-1"]),
        (["plan"], "--mfu", ["0", "-1", "40", "nan"]),
        (["plan"], "--tokens", ["0", "-1", "inf", "nan"]),
        (["prepare", "wiki"], "--vocab-size", ["0", "-1", "200", "nan", "1" * 30]),
        (["prepare", "wiki"], "--heldout-fraction", ["-1", "1", "nan"]),
        (
            ["tokenizer", "--data", "d", "--output", "o"],
            "--vocab-size",
            ["0", "200", "nan"],
        ),
        (
            ["tokenizer", "--data", "d", "--output", "o", "--vocab-size", "300"],
            "--heldout-fraction",
            ["-1", "1", "inf"],
        ),
    ],
)
def test_impossible_numbers_are_refused_by_the_flag_s_name(
    command, flag, values, capsys
):
    for value in values:
        assert flag in refused(capsys, *command, flag, value)


def test_a_step_is_a_number(capsys):
    assert "step" in refused(capsys, "trace", "-1") and "step" in refused(
        capsys, "trace", "two"
    )


def test_the_wrong_word_is_named(capsys):
    assert "'generat'" in refused(capsys, "generat", "x")


@pytest.mark.parametrize(
    "error, code, said",
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."
            ),
            2,
            "memory",
        ),
        (MemoryError(), 2, "memory"),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"
                " to allocate 9 bytes"
            ),
            2,
            "memory",
        ),
        (ValueError("a\nb"), 2, "a b"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.jsonl"), 2, "x.jsonl"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "x"],
        ["eval"],
        ["trace", "1"],
        ["export", "a", "b"],
        ["tokenizer", "--data", "d", "--output", "o", "--vocab-size", "300"],
    ],
)
def test_every_command_ends_an_error_in_one_line(
    command, error, code, said, monkeypatch, capsys
):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(f"qwen_analog.{cli.COMMANDS[command[0]].run}", fails)
    assert main(command) == code
    err = capsys.readouterr().err
    assert said in err and err.count("\n") <= 1


def test_what_is_no_mistake_of_the_user_keeps_its_stack_trace(monkeypatch, here):
    monkeypatch.setattr(commands, "load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["generate", "x", "--model", "c"])


@pytest.mark.slow
def test_an_interrupt_that_a_callback_swallows_comes_again(monkeypatch, here, capsys):
    class Dies:
        def __del__(self):
            raise KeyboardInterrupt

    def work(*_, **__):
        Dies()
        time.sleep(20)

    monkeypatch.setattr(commands, "load", work)
    hook = sys.unraisablehook
    # a shell starts what runs in its background with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["generate", "x", "--model", "c"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Traceback" not in capsys.readouterr().err and sys.unraisablehook is hook


def start(*argv, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *argv],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_ctrl_c_while_the_libraries_are_imported():
    ready = (
        "import sys; sys.argv = ['-m']; sys.orig_argv = ['python', '-m',"
        " 'qwen_analog']; print('x', flush=True); from qwen_analog.cli import main;"
        " main(['generate', 'x'])"
    )
    process = start(
        "-c",
        ready,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdout.read(1)
    time.sleep(0.5)  # torch takes longer than that
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130 and process.stderr.read() == ""


def test_a_full_disk_under_the_output(here):
    with open("/dev/full", "w") as full:
        process = start(
            "-m",
            "qwen_analog.cli",
            "generate",
            "x",
            "--model",
            "c",
            "--max-new-tokens",
            "3",
            stdout=full,
        )
        error = process.stderr.read()
    assert (
        process.wait() == 2
        and error.count("\n") == 1
        and "standard output" in error
        and "No space" in error
    )


@contextmanager
def small_files(size):
    """No file may grow beyond `size` bytes: what a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_under_files_names_them(here, model, monkeypatch):
    save_pretrained(model, BYTES, "theirs")
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # pytest's are files
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for size in (1000, 2000):  # within its config.json, its tokenizer
        for command in (
            ["import", "theirs", "i/n"],
            ["export", "theirs", "i/n"],
            ["tokenizer", "--data", "d.jsonl", "--vocab-size", "300", "--output", "v"],
        ):
            sys.stderr.truncate(sys.stderr.seek(0))
            with small_files(size):
                assert main(command) == 2
            error = sys.stderr.getvalue()
            assert (
                error.count("\n") == 1
                and command[-1] in error
                and "File too large" in error
            ), error
            assert not list(Path(command[-1]).glob("*"))


def test_a_finished_command_is_not_killed_while_python_ends(here, monkeypatch):
    def quiet(*_):
        pass

    quiet.quiet, left = True, []
    monkeypatch.setattr(cli.atexit, "register", lambda *call: left.append(call))
    before = signal.signal(signal.SIGINT, quiet)
    try:
        assert main(["generate", "x", "--model", "c", "--max-new-tokens", "1"]) == 0
        assert signal.getsignal(signal.SIGINT) is quiet and left == [
            (signal.signal, signal.SIGINT, signal.SIG_IGN)
        ]
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_held_back_while_a_command_is_imported(monkeypatch, capfd):
    def swallowing(path):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return lambda arguments: None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(cli, "find", swallowing)
    try:
        assert cli.main(["plan"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capfd.readouterr().err


def test_a_command_in_a_thread(monkeypatch):
    monkeypatch.setattr(cli, "find", lambda path: lambda arguments: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    codes = []
    try:
        thread = threading.Thread(target=lambda: codes.append(cli.main(["plan"])))
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert codes == [0]


AT_IMPORT = """
import os, sys

for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
    os.environ.pop(name, None)  # the environment of these tests
os.environ.update(word.split("=") for word in sys.argv[1].split())


class Import:
    def find_spec(self, name, *_):
        if name == "torch":
            names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
            print(*map(os.environ.get, names), flush=True)
            os._exit(0)


sys.meta_path.insert(0, Import())
from qwen_analog.cli import main

main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("own", "words", "expected"),
    [
        ("", "generate x", "None 10000"),
        ("", "chat", "None 10000"),
        ("OMP_WAIT_POLICY=PASSIVE", "generate x", "PASSIVE None"),
        ("GOMP_SPINCOUNT=9", "chat", "None 9"),
        ("KMP_BLOCKTIME=0", "generate x", "None None"),
        ("", "serve", "None None"),
        ("", "eval --data d.jsonl", "None None"),
        ("", "train --data d.jsonl", "None None"),
    ],
)
def test_how_threads_wait_is_chosen_before_torch_is_imported(own, words, expected):
    found = subprocess.run(
        [sys.executable, "-c", AT_IMPORT, own, *words.split()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.stdout.strip() == expected, found.stderr


def test_how_threads_wait_is_not_chosen_too_late(monkeypatch):
    """Where torch is there already, only what the process starts would see it."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    assert "torch" in sys.modules
    assert main(["generate", "x", "--model", "/nothing/here"]) == 2
    assert "GOMP_SPINCOUNT" not in os.environ
