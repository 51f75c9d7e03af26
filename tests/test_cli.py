"""The command `qwen-analog`: every mistake is one line that names its flag or file,
every failure has its exit code, nothing is lost.
"""

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from book import scramble_
from qwen_analog import cli, memory
from qwen_analog.checkpoint import save_checkpoint
from qwen_analog.cli import main
from qwen_analog.config import QwenConfig
from qwen_analog.data import held_out_mask, write_jsonl
from qwen_analog.hf import save_pretrained
from qwen_analog.model import QwenForCausalLM
from qwen_analog.tokenizer import BYTE_ORDER, TiktokenTokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
BYTES = TiktokenTokenizer({token: rank for rank, token in enumerate(BYTE_ORDER)})
CONFIG = QwenConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    rope_theta=1e4,
)


@pytest.fixture(scope="module")
def model():
    return scramble_(QwenForCausalLM(CONFIG)).eval()


@pytest.fixture
def here(tmp_path, monkeypatch, model):
    """An empty directory with a checkpoint "c", and documents "d.jsonl"."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint("c", model, BYTES)
    write_jsonl(
        (
            {"title": f"t{i}", "text": f"document {i} says that {i} is a number"}
            for i in range(200)
        ),
        "d.jsonl",
    )
    return tmp_path


def refused(capsys, *argv):
    """The one line with which the command refuses."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("qwen-analog: error: ") and said.err.count("\n") == 1, (
        said.err
    )
    return said.err


# numbers


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


# errors


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

    parser = cli.build_parser()
    monkeypatch.setattr(cli, "build_parser", lambda: parser)
    monkeypatch.setattr(
        parser,
        "parse_args",
        lambda argv, real=parser.parse_args: replaced(real(argv), fails),
    )
    assert main(command) == code
    err = capsys.readouterr().err
    assert said in err and err.count("\n") <= 1


def replaced(arguments, run):
    arguments.run = run
    return arguments


def test_what_is_no_mistake_of_the_user_keeps_its_stack_trace(monkeypatch, here):
    monkeypatch.setattr(cli, "model_on_device", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["generate", "x", "--checkpoint", "c"])


def test_an_interrupt_that_a_callback_swallows_comes_again(monkeypatch, here, capsys):
    class Dies:
        def __del__(self):
            raise KeyboardInterrupt

    def work(*_):
        Dies()
        time.sleep(20)

    monkeypatch.setattr(cli, "model_on_device", work)
    hook = sys.unraisablehook
    assert main(["generate", "x", "--checkpoint", "c"]) == 130
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
        " 'qwen_analog.cli']; print('x', flush=True); import qwen_analog.cli"
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
            "--checkpoint",
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
        assert (
            main(["generate", "x", "--checkpoint", "c", "--max-new-tokens", "1"]) == 0
        )
        assert signal.getsignal(signal.SIGINT) is quiet and left == [
            (signal.signal, signal.SIGINT, signal.SIG_IGN)
        ]
    finally:
        signal.signal(signal.SIGINT, before)


# memory


def test_what_does_not_fit_is_refused_and_can_be_overruled(here, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    for command in (
        ["generate", "x", "--checkpoint", "c", "--max-new-tokens", "9"],
        ["eval", "--model", "c", "--data", "d.jsonl"],
        ["export", "c", "e"],
        ["import", "c", "i"],
    ):
        line = refused(capsys, *command)
        assert "--ignore-memory" in line and "MB" in line
        assert main([*command, "--ignore-memory"]) == 0


def test_a_long_answer_is_counted(here, monkeypatch, capsys):
    left = sum(p.nbytes for p in QwenForCausalLM(CONFIG).parameters()) * 3
    monkeypatch.setattr(
        memory,
        "available_memory",
        lambda device: left if len(asked.append(1) or asked) == 1 else 1000,
    )
    asked = []
    assert "--max-new-tokens" in refused(
        capsys, "generate", "x", "--checkpoint", "c", "--max-new-tokens", "60"
    )


# generate


def test_the_model_s_own_settings_count_where_no_flag_is_given(
    here, model, monkeypatch, capsys
):
    taken = []
    monkeypatch.setattr(
        cli, "complete", lambda *a, **options: taken.append(options) or "text"
    )
    monkeypatch.setattr(cli, "model_on_device", lambda *_: (model, BYTES))
    for own, flags, expected in (
        ({}, [], {"temperature": 0.7}),
        ({"do_sample": False}, [], {"temperature": 0}),
        ({"do_sample": True, "temperature": 0.3, "top_k": 0}, [], {"temperature": 0.3}),
        (
            {"do_sample": True, "temperature": 0.3, "top_k": 5},
            ["--temperature", "0.9"],
            {"temperature": 0.9, "top_k": 5},
        ),
    ):
        monkeypatch.setattr(model, "generation_config", own, raising=False)
        assert main(["generate", "x", *flags]) == 0
        options = taken.pop()
        assert {
            name: options[name]
            for name in cli.SAMPLING
            if options.get(name) is not None
            and (name, options[name]) != ("repetition_penalty", 1.0)
        } == expected


def test_an_answer_too_long_is_refused_by_the_flag_s_name_before_any(here, capsys):
    line = refused(
        capsys, "generate", "x", "x" * 50, "--checkpoint", "c", "--max-new-tokens", "20"
    )
    assert "leaves 13 of c's 64 positions" in line and "--max-new-tokens" in line


# directories


def test_export_and_import_are_refused_before_weights_are_read(
    here, monkeypatch, capsys
):
    monkeypatch.setattr(
        cli, "open_model", lambda *a, **o: pytest.fail("weights are read")
    )
    Path("there").mkdir()
    Path("file").touch()
    os.symlink("nowhere", "dangling")
    for command in ("export", "import"):
        for directory in ("there", "file", "file/x", "/proc/nowhere/x", "dangling"):
            assert directory.split("/")[0] in refused(capsys, command, "c", directory)
    assert sorted(p.name for p in here.iterdir()) == [
        "c",
        "d.jsonl",
        "dangling",
        "file",
        "there",
    ]


@pytest.mark.parametrize("directory", ["nowhere", "c", "d.jsonl", "/dev/null", "."])
def test_consolidate_names_what_holds_no_shards(directory, here, capsys):
    assert f"{directory} holds no sharded checkpoint" in refused(
        capsys, "consolidate", directory
    )


def test_trace_says_where_texts_are_gone(here, monkeypatch, capsys):
    sources = ["d.jsonl:2", "d.jsonl:900", "gone.jsonl:1", "hf:owner/name:7"]
    monkeypatch.setattr(cli, "documents_of_step", lambda *_: sources)
    assert main(["trace", "3"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "d.jsonl:2  'document 1 says that 1 is a number'",
        "d.jsonl:900  (the file has no such line any more)",
        "gone.jsonl:1",
        "hf:owner/name:7",
    ]
    assert "gone.jsonl" in said.err and said.err.count("\n") == 1


# vocabularies


def test_a_vocabulary_of_one_s_own_text(here, capsys):
    assert (
        main(
            [
                "tokenizer",
                "--data",
                "d.jsonl",
                "--vocab-size",
                "290",
                "--output",
                "v/w",
                "--heldout-fraction",
                "0.2",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    tokenizer = load_tokenizer("tiktoken:v/w/tokenizer.tiktoken")
    assert (
        tokenizer.vocab_size == 290
        and '"tiktoken:v/w/tokenizer.tiktoken"' in said
        and '"vocab_size": 290' in said
    )
    assert [p.name for p in Path("v/w").iterdir()] == ["tokenizer.tiktoken"]
    assert "exists already" in refused(
        capsys,
        "tokenizer",
        "--data",
        "d.jsonl",
        "--vocab-size",
        "320",
        "--output",
        "v/w",
    )


@pytest.mark.parametrize(
    "fraction", [0.5, 0.001]
)  # by the hash alone, and where it chooses none
def test_a_vocabulary_never_sees_what_is_held_out(fraction, here, monkeypatch):
    given = []
    monkeypatch.setattr(cli, "_learn", lambda texts, size: given.extend(texts) or BYTES)
    rows = [json.loads(line) for line in Path("d.jsonl").read_text().splitlines()][:20]
    write_jsonl(rows, "few.jsonl")
    assert (
        main(
            [
                "tokenizer",
                "--data",
                "few.jsonl",
                "--vocab-size",
                "300",
                "--output",
                "v",
                "--heldout-fraction",
                str(fraction),
            ]
        )
        == 0
    )
    held = held_out_mask([row["title"] for row in rows], fraction)
    assert 0 < held.sum() < 20 and given == [
        row["text"] for row, out in zip(rows, held) if not out
    ]


def test_a_vocabulary_learns_from_an_even_sample_of_much_text(
    here, monkeypatch, capsys
):
    monkeypatch.setattr(cli, "LEARN_FROM", 1000)
    given = []
    monkeypatch.setattr(cli, "_learn", lambda texts, size: given.extend(texts) or BYTES)
    assert (
        main(
            [
                "tokenizer",
                "--data",
                "d.jsonl",
                "--vocab-size",
                "300",
                "--output",
                "v",
                "--heldout-fraction",
                "0",
            ]
        )
        == 0
    )
    numbers = [int(text.split()[1]) for text in given]
    assert (
        900 < sum(map(len, given)) < 1100
        and numbers[0] < 10
        and numbers[-1] > 190
        and max(b - a for a, b in zip(numbers, numbers[1:])) < 15
    )
    assert "a sample of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "data, said",
    [
        ("nowhere.jsonl", "nowhere.jsonl"),
        ("bad.jsonl", "line 1"),
        ("empty.jsonl", "empty.jsonl"),
    ],
)
def test_a_vocabulary_of_nothing(data, said, here, capsys):
    Path("bad.jsonl").write_text("{\n")
    Path("empty.jsonl").touch()
    assert said in refused(
        capsys, "tokenizer", "--data", data, "--vocab-size", "300", "--output", "v"
    )
    assert not list(Path("v").glob("*"))


def test_a_corpus_is_written_whole_or_not_at_all(here, monkeypatch, capsys):
    monkeypatch.setitem(
        cli.CORPORA,
        "wiki",
        lambda: iter([{"title": str(i), "text": f"text {i}"} for i in range(30)]),
    )

    def full(tokenizer, directory):
        raise OSError(errno.ENOSPC, "No space left on device", str(directory))

    with monkeypatch.context() as patched:
        patched.setattr(TiktokenTokenizer, "save", full)
        assert "No space" in refused(
            capsys, "prepare", "wiki", "--output", "w", "--vocab-size", "300"
        )
    assert not list(Path("w").iterdir())
    assert main(["prepare", "wiki", "--output", "w", "--vocab-size", "300"]) == 0
    assert sorted(p.name for p in Path("w").iterdir()) == [
        "tokenizer.tiktoken",
        "wiki.jsonl",
    ]
    assert "exists already" in refused(
        capsys, "prepare", "wiki", "--output", "w", "--vocab-size", "300"
    )


def test_what_transformers_wrote_can_be_written_with(here, model, capsys):
    save_pretrained(model, BYTES, "theirs")
    assert (
        main(
            [
                "generate",
                "a",
                "--checkpoint",
                "theirs",
                "--max-new-tokens",
                "2",
                "--seed",
                "1",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.startswith("a")
