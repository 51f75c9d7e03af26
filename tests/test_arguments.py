"""Flags, extras that are missing, and the end of a command."""

import argparse
import subprocess
import sys

import pytest

from helpers import ROOT
from qwen_analog import arguments, cli


@pytest.mark.parametrize("module, extra", [("datasets", "train"), ("gguf", "hf")])
def test_a_missing_library_names_its_extra(module, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(arguments.MissingExtraError) as error:
        arguments.need(module)
    assert error.value.name == module and f"'.[{extra}]'" in str(error.value)

    def action():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    assert arguments.report_errors("p", action) == 2
    said = capsys.readouterr().err
    assert f"pip install -e '.[{extra}]'" in said and said.count("\n") == 1


def test_a_missing_module_of_ours_is_a_mistake_of_ours():
    def action():
        raise ModuleNotFoundError("No module named 'x'", name="x")

    with pytest.raises(ModuleNotFoundError):
        arguments.report_errors("p", action)
    with pytest.raises(ModuleNotFoundError):
        arguments.need("qwen_analog.nothing")


def test_every_extra_is_one_of_the_project():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(arguments.EXTRAS) <= set(project["optional-dependencies"])
    for extra, modules in arguments.EXTRAS.items():
        listed = " ".join(project["optional-dependencies"][extra])
        for module in modules.split():
            assert module.replace("_", "-") in listed.replace("_", "-"), module


@pytest.mark.parametrize("older", [(), ("--checkpoint",)])
def test_a_model_is_named_by_one_flag(older, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    arguments.add_model(parser, *older, default=arguments.default_model())
    assert parser.parse_args([]).model == "smollm2"
    for flag in ("--model", *older):
        assert parser.parse_args([flag, "x"]).model == "x"
    (tmp_path / "checkpoints" / "final").mkdir(parents=True)
    assert arguments.default_model() == "checkpoints/final"


@pytest.mark.parametrize("module", ["qwen_analog", "qwen_analog.cli"])
def test_nothing_heavy_is_imported_for_the_help(module):
    code = (
        f"import sys, {module}; heavy = {{'torch', 'numpy', 'datasets', 'pydantic',"
        " 'transformers', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)])
def test_the_help_of_every_command_needs_nothing_heavy(command):
    code = (
        "import sys; from qwen_analog.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    words = [sys.executable, "-c", code, *command, "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert " ".join(["usage: qwen-analog", *command]) in done.stdout


def test_choices_in_flags_are_those_of_the_modules_that_offer_them():
    from qwen_analog.evaluate import HELDOUT_FRACTION
    from qwen_analog.hardware import GPUS
    from qwen_analog.prepare import CONVERSATIONS, CORPORA

    def actions(add):
        parser = argparse.ArgumentParser()
        add(parser)
        return {action.dest: action for action in parser._actions}

    assert actions(arguments.add_plan_arguments)["gpu"].choices == tuple(GPUS)
    corpus = actions(arguments.add_prepare_arguments)["corpus"]
    assert corpus.choices == (*CORPORA, *CONVERSATIONS)
    share = actions(arguments.add_eval_arguments)["heldout_fraction"]
    assert f"{HELDOUT_FRACTION} for other models" in share.help


@pytest.mark.parametrize("gpu", [False, True])
def test_nothing_is_searched_for_garbage_when_a_gpu_was_used(gpu, monkeypatch):
    frozen = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: gpu)
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(1))
    assert arguments.report_errors("p", lambda: None) == 0
    assert len(frozen) == gpu
