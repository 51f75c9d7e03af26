"""The compiled step against the plain model: the same text, and no program twice."""

import copy
import gc
import shutil
from functools import partial

import pytest
import torch
from book import scramble_
from weights_helpers import QWEN3

import test_inference
from qwen_analog import QwenConfig, QwenForCausalLM
from qwen_analog import compiled as module
from qwen_analog import compiled_blocks
from qwen_analog.compiled import StaticCache, StaticStep, room_for
from qwen_analog.generate import decode_steps, pad_left
from qwen_analog.inference import optimize_for_inference

IDS, REAL = pad_left([[5, 9, 30, 2], [7, 8], [3]], 0)
GREEDY = {"temperature": 0, "eos_token_id": []}
no_compiler = module.missing_compiler(torch.device("cpu"))
made_packages: list = []


def run_in_python(monkeypatch):
    """A library is its traced block, not translated to C++, which takes seconds."""

    def package(block, call):
        made_packages.append(block)
        return block

    def load(block, packed):
        def run(inputs):
            for name, matrix in packed.items():
                setattr(block, name, matrix)
            n = len(inputs) - len(block.inputs)
            return [block(inputs[:n], inputs[n:])]

        return run

    made_packages.clear()
    monkeypatch.setattr(compiled_blocks, "compile_package", package)
    monkeypatch.setattr(compiled_blocks, "load_package", load)


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    run_in_python(monkeypatch)
    monkeypatch.setattr(module, "ROOM", 8)


def programs() -> int:
    return len(made_packages)


def make(dtype=torch.float32, **changes):
    return test_inference.make(**changes).to(dtype)


def laid_out(model, **options):
    return optimize_for_inference(copy.deepcopy(model), **options)


def same_text(model, quantize=None, new=8) -> bool:
    """Three padded rows, through rooms of 6, 8 and 12 tokens."""
    plain = laid_out(model, quantize=quantize)
    compiled = laid_out(model, quantize=quantize, compile=True)
    options = {**GREEDY, "attention_mask": REAL}
    texts = [m.generate(IDS, new, **options) for m in (plain, compiled)]
    return torch.equal(*texts)


@pytest.mark.parametrize("changes", [{}, {**QWEN3, "num_key_value_heads": 1}])
def test_text_is_the_plain_models(changes):
    assert same_text(make(**changes))


def test_text_is_the_plain_models_in_bfloat16_and_in_eight_bits():
    assert same_text(make(torch.bfloat16)) and same_text(make(), "int8")


def test_samples_of_one_prompt():
    drawn = {"temperature": 1.0, "seed": 3, "num_return_sequences": 2}
    models = make(), laid_out(make(), compile=True)
    texts = [m.generate(IDS[:1], 4, **GREEDY | drawn) for m in models]
    assert torch.equal(*texts) and not torch.equal(*texts[0])


def test_four_bits_are_compiled_too():
    model = laid_out(make(), quantize="int4", compile=True)
    model.generate(IDS, 3, attention_mask=REAL, **GREEDY)
    assert programs() == 1 and model.compiled_step.made


def test_a_program_for_all_rooms_and_none_for_a_token():
    model = laid_out(make(), compile=True)
    write = partial(model.generate, **GREEDY)
    write(IDS, 12, attention_mask=REAL)  # 4 tokens held, 15 at the last step
    assert list(model.compiled_step.made) == [(3, n) for n in (6, 8, 12, 16)]
    assert programs() == 1
    write(IDS, 12, attention_mask=REAL)
    write(IDS[:, :2], 9)
    assert programs() == 1
    write(IDS[:1], 3)
    assert programs() == 2 and (1, 6) in model.compiled_step.made
    assert not any(model.compiled_step.made.values())  # nothing is kept


@pytest.mark.parametrize("recorded", [False, True])
def test_two_texts_by_turns_and_a_room_used_again(monkeypatch, recorded):
    monkeypatch.setattr(module, "_record", Replayed)
    plain, model = make(), laid_out(make(), compile=True)
    model.compiled_step.cuda = recorded
    prompts = IDS[:1], IDS[:1].flip(1)
    expected = [plain.generate(p, 4, **GREEDY)[0, 4:].tolist() for p in prompts]
    steps = [decode_steps(model, p, 4, **GREEDY) for p in prompts]
    found = [[step.ids[0] for step in both] for both in zip(*steps)]
    assert [list(row) for row in zip(*found)] == expected
    del steps
    gc.collect()
    model.generate(IDS[:1], 4, **GREEDY)
    kept = [len(made) for made in model.compiled_step.made.values()]
    assert kept == ([2] if recorded else [0, 0])


def test_inside_inference_mode_and_outside():
    plain, model = make(), laid_out(make(), compile=True)
    expected = plain.generate(IDS[:1], 8, **GREEDY)
    with torch.inference_mode():
        assert torch.equal(model.generate(IDS[:1], 8, **GREEDY), expected)
    assert torch.equal(model.generate(IDS[:1], 8, **GREEDY), expected)


class Replayed:
    """What a CUDA graph does: the same step again, its result at the same place."""

    def __init__(self, step, memory):
        self.step, self.memory = step, memory
        memory.logits = step.logits(memory)
        memory.graph = self

    def replay(self):
        self.memory.logits.copy_(self.step.logits(self.memory))


def test_a_recorded_step_writes_the_same(monkeypatch):
    monkeypatch.setattr(module, "_record", Replayed)
    model = laid_out(make(), compile=True)
    model.compiled_step.cuda = True
    options = {**GREEDY, "attention_mask": REAL, "return_logprobs": True}
    found = model.generate(IDS, 8, **options)
    expected = make().generate(IDS, 8, **options)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-3)
    made = [memory for rooms in model.compiled_step.made.values() for memory in rooms]
    assert len(made) == 2 and all(isinstance(m.graph, Replayed) for m in made)


def test_a_compiler_that_fails_is_done_without(monkeypatch, capsys):
    def fails(block, call):
        raise RuntimeError("no\nsuch luck")

    monkeypatch.setattr(compiled_blocks, "compile_package", fails)
    assert same_text(make())
    said = capsys.readouterr().err.splitlines()
    assert said == ["note: the writing of tokens is not compiled: no such luck"]


def test_without_a_compiler_the_model_is_laid_out_as_ever(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = laid_out(make(), compile=True)
    assert model.compiled_step is None
    said = capsys.readouterr().err
    assert "no-such-compiler" in said and said.count("\n") == 1
    assert torch.equal(
        model.generate(IDS[:1], 3, **GREEDY), make().generate(IDS[:1], 3, **GREEDY)
    )


def test_rooms():
    assert [room_for(n) for n in (1, 8, 9, 17)] == [8, 8, 16, 32]
    finely = [room_for(n, finely=True) for n in (1, 3, 8, 9, 13, 17, 32)]
    assert finely == [2, 4, 8, 12, 16, 24, 32]


@pytest.mark.slow
@pytest.mark.skipif(bool(no_compiler), reason=str(no_compiler))
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_translated_to_c_plus_plus(monkeypatch, quantize, tmp_path, capsys):
    """The second model finds the library of the first."""
    monkeypatch.undo()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = make(torch.bfloat16, num_hidden_layers=2)
    assert same_text(model, quantize, new=4)
    kept = list(tmp_path.glob("qwen_analog/*"))
    written = [path.stat().st_mtime_ns for path in kept]
    assert same_text(model, quantize, new=4)
    assert [p.stat().st_mtime_ns for p in tmp_path.glob("qwen_analog/*")] == written
    assert [path.suffix for path in kept] == [".pt2"]
    assert not capsys.readouterr().err


def sees_one_more(self, cache):
    cache.slots -= 1
    found = LOGITS(self, cache)
    cache.slots += 1
    return found


def without_padding(self, keys, values, held, padding):
    FILL(self, keys, values, held, None)


def one_token_less(self, keys, values, held, padding):
    FILL(self, keys, values, held - 1, padding)
    self.position += 1


FILL, LOGITS = StaticCache.fill, StaticStep.logits


def one_slot_on(self, layer_idx, keys, values):
    self.keys.index_copy_(2, self.position - 1, keys)
    self.values.index_copy_(2, self.position - 1, values)
    return self.keys, self.values


def never_free(self, reader, keys, values):
    """The room of another reader is taken."""
    for made in self.made.values():
        for memory in made:
            memory.reader = lambda: None
    return LEND(self, reader, keys, values)


LEND = module.CompiledStep.lend


@pytest.mark.mutant
@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (StaticStep, "logits", sees_one_more),
        (StaticCache, "fill", without_padding),
        (StaticCache, "fill", one_token_less),
        (module._Slot, "update", one_slot_on),
    ],
)
def test_broken_parts_are_noticed(monkeypatch, owner, name, broken):
    monkeypatch.setattr(owner, name, broken)
    assert not same_text(make())


def first_inputs(self, layer, slot, call, prepare=None):
    """Every block runs with the plain tensors of the first."""
    run, inputs = prepare(self, layer, slot, call)
    given = len(compiled_blocks.TracedBlock(layer, slot).given)
    self.first = getattr(self, "first", inputs[:given])
    return run, [*self.first, *inputs[given:]]


@pytest.mark.mutant
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_tensors_of_another_block_are_noticed(monkeypatch, quantize):
    prepare = compiled_blocks.CompiledBlocks.prepare
    broken = partial(first_inputs, prepare=prepare)
    monkeypatch.setattr(
        compiled_blocks.CompiledBlocks,
        "prepare",
        lambda self, layer, slot, call: broken(self, layer, slot, call),
    )
    assert not same_text(make(torch.bfloat16), quantize)


@pytest.mark.mutant
def test_packed_matrices_of_another_block_are_noticed(monkeypatch):
    load = compiled_blocks.load_package
    monkeypatch.setattr(
        compiled_blocks, "load_package", lambda block, packed: load(block, block.packed)
    )
    assert not same_text(make(torch.bfloat16))


@pytest.mark.mutant
def test_a_room_that_is_taken_is_noticed(monkeypatch):
    monkeypatch.setattr(module.CompiledStep, "lend", never_free)
    with pytest.raises((AssertionError, IndexError)):
        test_two_texts_by_turns_and_a_room_used_again(monkeypatch, True)
