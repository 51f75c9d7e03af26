"""Any source of weights: what is one, where it lies, and the memory it needs."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from weights_helpers import IDS, TOKENIZER, small, write_gguf

from qwen_analog import checkpoint, hardware, hf, loading
from qwen_analog.archive import CheckpointError
from qwen_analog.checkpoint import save_checkpoint
from qwen_analog.gguf import smollm2_path
from qwen_analog.gguf_file import read_gguf
from qwen_analog.hf import save_pretrained
from qwen_analog.loading import load, open_source, read_config
from qwen_analog.model import QwenForCausalLM


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_pretrained(
        small(), TOKENIZER, tmp_path_factory.mktemp("loading") / "model"
    )


def test_load(tmp_path, monkeypatch):
    """The same model, tokenizer and settings from every place."""
    model = small()
    model.generation_config = {"eos_token_id": [402, 400]}
    save_checkpoint(tmp_path / "final", model, TOKENIZER, safetensors=True)
    save_pretrained(model, TOKENIZER, tmp_path / "hf")
    wide = small(hidden_size=96, intermediate_size=64)
    path = write_gguf(tmp_path / "m.gguf", wide)
    monkeypatch.setattr(loading, "smollm2_path", lambda: path)
    for source, saved in (
        (tmp_path / "final", model),
        (str(tmp_path / "final"), model),
        (tmp_path / "final" / "checkpoint.pt", model),
        (tmp_path / "hf", model),
        (tmp_path / "m.gguf", wide),
        ("smollm2", wide),
    ):
        again, tokenizer = load(source)
        assert torch.equal(again(IDS), saved(IDS)) and not again.training
        assert tokenizer.encode("The cat") == TOKENIZER.encode("The cat")
        assert again.generation_config.eos_token_id == (402, 400)
        assert {p.dtype for p in again.parameters()} == {torch.float32}
        half = load(source, dtype=torch.bfloat16)[0]
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert read_config(source) == again.config
    with pytest.raises(ValueError, match="there is no directory nothing"):
        load("nothing")


def test_a_runs_directory_is_its_newest_whole_checkpoint(tmp_path, capsys):
    saved = {}
    for name, layers in (("step_9", 1), ("step_10", 2), ("final", 3)):
        saved[name] = small(num_hidden_layers=layers)
        save_checkpoint(tmp_path / "run" / name, saved[name], TOKENIZER)
        assert torch.equal(load(tmp_path / "run")[0](IDS), saved[name](IDS))
        assert read_config(tmp_path / "run").num_hidden_layers == layers
    (tmp_path / "run" / "train_config.json").write_text("{}")
    final = tmp_path / "run" / "final" / "checkpoint.pt"
    final.write_bytes(final.read_bytes()[:-100])
    capsys.readouterr()
    assert torch.equal(load(tmp_path / "run")[0](IDS), saved["step_10"](IDS))
    assert "final passed over" in capsys.readouterr().err
    for step in ("step_9", "step_10"):
        shutil.rmtree(tmp_path / "run" / step)
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        load(tmp_path / "run")


def test_a_source_without_a_tokenizer(tmp_path):
    model = small()
    save_pretrained(model, None, tmp_path / "m")
    again, tokenizer = open_source(tmp_path / "m")
    assert tokenizer is None and torch.equal(again(IDS), model(IDS))
    with pytest.raises(ValueError, match="m holds no tokenizer: .*from_pretrained"):
        load(tmp_path / "m")


def test_a_model_is_saved_and_loaded_by_its_own_methods(tmp_path):
    model = small()
    model.save_pretrained(tmp_path / "m", TOKENIZER, dtype=torch.bfloat16)
    again = QwenForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.to(torch.bfloat16))


def test_a_checkpoint_is_opened_without_heavy_libraries(tmp_path):
    save_checkpoint(tmp_path / "final", small(), TOKENIZER)
    code = (
        "import sys; from qwen_analog.loading import load;"
        f" load({str(tmp_path / 'final')!r});"
        ' print({"transformers", "tokenizers", "gguf", "jinja2"} & {*sys.modules})'
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


HF_NAMES = ("config.json", "tokenizer.json", "model.safetensors")


@pytest.mark.parametrize(
    "source, message",
    [
        ("", "'' is no source of a model: name a checkpoint"),
        ("  ", "is no source of a model"),
        ("a\nb", "is no source of a model"),
        ("a\0b", "is no source"),
        (None, "None is no source of a model"),
        (3, "3 is no source of a model"),
        ("empty", "empty holds no model .no checkpoint.pt, no config.json.: name a"),
        ("runs", "runs holds no whole checkpoint"),
        ("quants", "quants holds GGUF files: name one of them, quants/a.gguf"),
        *(
            (
                f"hf/{name}",
                (
                    f"hf/{name} is one file of a Hugging Face model: name its"
                    " directory, hf"
                ),
            )
            for name in HF_NAMES
        ),
        ("hf/pytorch_model.bin", "pytorch_model.bin may run code when it is read"),
        ("other.zip", "other.zip"),
        ("notes.txt", "notes.txt is no model: name a"),
        ("odd.bin", "odd.bin is a GGUF file without the ending .gguf"),
        ("some.gguf", "some.gguf"),
        ("no.gguf", "there is no file no.gguf"),
        ("no.pt", "there is no directory no.pt and no file"),
        ("/dev/null", "/dev/null is neither a file nor a directory"),
        (
            "checkpoints/final",
            "there is no checkpoint at checkpoints/final: train one first",
        ),
        ("a/b/c", "there is no directory a/b/c and no file"),
        ("../x/y", "there is no directory ../x/y"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("owner/name", "hub's owner/name cannot be fetched from here"),
        (b"hf", "is no source of a model"),
        ("a b/c", "there is no directory a b/c"),
    ],
    ids=lambda v: repr(v)[:24],
)
def test_what_is_no_source_is_one_line(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "runs/final", "runs/step_3", "quants", "hf"):
        Path(name).mkdir(parents=True)
    for name in (
        *(f"hf/{name}" for name in HF_NAMES),
        "quants/a.gguf",
        "notes.txt",
        "some.gguf",
    ):
        Path(name).write_text("text")
    for name in ("hf/pytorch_model.bin", "other.zip"):
        with zipfile.ZipFile(name, "w") as file:
            file.writestr("a/data.pkl", b"junk")
    Path("odd.bin").write_bytes(b"GGUF....")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message) as error:
        load(source)
    assert "\n" not in str(error.value)


def test_paths_with_blanks_and_a_tilde(tmp_path, monkeypatch, directory):
    model = small()
    monkeypatch.setenv("HOME", str(tmp_path))
    save_checkpoint(tmp_path / "my runs" / "final", model, TOKENIZER)
    shutil.copytree(directory, tmp_path / "a model")
    for source in ("~/my runs/final", "~/a model", tmp_path / "my runs" / "final"):
        assert torch.equal(
            load(source)[0](torch.arange(5)[None]), model(torch.arange(5)[None])
        )


@pytest.fixture
def reads(monkeypatch):
    """What was read of models; nothing really is."""
    done = []
    for place, name in (
        (checkpoint, "load_model"),
        (hf, "load_pretrained"),
        (loading, "load_gguf"),
    ):
        monkeypatch.setattr(
            place,
            name,
            lambda *_, name=name: done.append(name) or (torch.nn.Linear(1, 1), 1),
        )
    return done


def room(monkeypatch, **left):
    monkeypatch.setattr(
        hardware, "available_memory", lambda device: left[torch.device(device).type]
    )


def test_the_memory_is_asked_before_a_weight_is_read(
    tmp_path, monkeypatch, directory, reads
):
    save_checkpoint(tmp_path / "final", small(), TOKENIZER)
    path = write_gguf(tmp_path / "m.gguf", small(hidden_size=96, intermediate_size=64))
    for source in (tmp_path / "final", directory, path):
        need = sum(loading.parameter_counts(read_config(source)).values()) * 4
        room(monkeypatch, cpu=need - 1)
        message = (
            f"^the model of {re.escape(str(source))} needs about .* of memory, and"
            " cpu has .* left: .*--ignore-memory"
        )
        with pytest.raises(ValueError, match=message):
            load(source, "cpu")
        assert reads == []
        load(source, "cpu", check_memory=False)
        room(monkeypatch, cpu=need)
        load(source, "cpu")
        assert len(reads) == 2
        reads.clear()


def test_half_the_memory_is_enough_for_half_the_bits(monkeypatch, directory, reads):
    need = sum(loading.parameter_counts(read_config(directory)).values()) * 2
    room(monkeypatch, cpu=need)
    load(directory, "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="cpu has"):
        load(directory, "cpu", torch.float32)
    assert len(reads) == 1


def test_a_gpu_is_taken_where_there_is_one_and_its_memory_asked(
    monkeypatch, directory, reads
):
    need = sum(loading.parameter_counts(read_config(directory)).values()) * 4
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *places: moved.append(places) or self
    )
    room(monkeypatch, cpu=need, cuda=need - 1)
    with pytest.raises(ValueError, match="and cuda has .* left"):
        load(directory)
    assert reads == [] and moved == []
    load(directory, "cpu")
    room(monkeypatch, cpu=need, cuda=need)
    load(directory)
    assert moved == [(torch.device("cpu"),), (torch.device("cuda"),)]


def test_smollm2_opens_without_what_it_does_not_need():
    code = (
        "import sys, qwen_analog, qwen_analog.gguf_file as files\n"
        "read, times = files.GGUFReader.value, []\n"
        "def counted(self, kind):\n"
        "    times.append(kind)\n"
        "    return read(self, kind)\n"
        "files.GGUFReader.value = counted\n"
        "model, tokenizer = qwen_analog.load('smollm2')\n"
        "assert tokenizer.decode(tokenizer.encode('so it is')) == 'so it is'\n"
        "heavy = {'transformers', 'torch._dynamo', 'torch.distributed.checkpoint'}\n"
        "print(len(times), sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # each value of the metadata once: the vocabulary is most of what there is to read
    metadata = read_gguf(smollm2_path()).metadata
    assert done.stdout == f"{len(metadata)} []\n", done.stderr
