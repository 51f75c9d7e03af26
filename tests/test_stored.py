"""GGUF files opened with their matrices kept as they are stored: logits and texts
beside the widened model, what is kept in memory, what is said, and what is refused.
"""

import gguf as library
import numpy as np
import pytest
import torch
from weights_helpers import IDS, TOKENIZER, one_line, small, write_gguf

from qwen_analog import (
    gguf as gguf_module,
    inference,
    load,
    loading,
    quantize as module,
)
from qwen_analog.cli import main
from qwen_analog.gguf import load_gguf, load_gguf_stored, stored_bytes
from qwen_analog.gguf_file import read_gguf
from qwen_analog.inference import SideBySide, optimize_for_inference
from qwen_analog.quantize import Blocks, HalvesLinear, Int4Linear, gguf_layer
from qwen_analog.checkpoint import save_checkpoint

KINDS = library.GGMLQuantizationType
SHAPES = {
    "qwen2": {"tie_word_embeddings": False},
    "llama, tied": {"attention_bias": False, "tie_word_embeddings": True},
}


def mixed(name):
    """Values finer than queries and keys, one layer in types that have no product."""
    if "layers.1.mlp.down_proj" in name:
        return KINDS.Q5_0
    return KINDS.Q8_0 if "v_proj" in name or "lm_head" in name else KINDS.Q4_1


def k_blocks(monkeypatch):
    """Let the writer make Q4_K blocks, of random levels with scales of a good size."""
    theirs = library.quants.quantize

    def blocks(data, kind):
        if kind != KINDS.Q4_K:
            return theirs(data, kind)
        random = np.random.default_rng(data.size)
        shape = data.shape[0], data.shape[1] // 256, 144
        rows = random.integers(0, 256, shape, dtype=np.uint8)
        rows[..., :4] = np.array([1e-4, 8e-4], np.float16).view(np.uint8)
        return rows.reshape(data.shape[0], -1)

    monkeypatch.setattr(library.quants, "quantize", blocks)


def written(path, kind, shape="qwen2", **changes):
    sizes = {"hidden_size": 96, "intermediate_size": 64}
    if kind == KINDS.Q4_K:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    model = small(**sizes, num_hidden_layers=2, **SHAPES[shape])
    return write_gguf(path, model, quantise=kind, **changes)


def off(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def both(path):
    return load_gguf(path)[0], load(path, "cpu", quantize="stored")[0]


@torch.no_grad()
def distance(path):
    wide, kept = both(path)
    return off(kept(IDS), wide(IDS))


ALL = [*(KINDS[k] for k in ("Q4_0", "Q4_1", "Q4_K", "Q8_0")), mixed]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ALL, ids=lambda k: getattr(k, "name", "mixed"))
def test_logits_are_those_of_the_widened_model(kind, shape, tmp_path, monkeypatch):
    """But for bfloat16: of the products, and of each group's scale."""
    k_blocks(monkeypatch)
    path = written(tmp_path / "m.gguf", kind, shape)
    assert distance(path) < 0.02
    wide, kept = both(path)
    ids = kept.generate(IDS[:1], 8, temperature=0, eos_token_id=())
    with torch.no_grad():
        logits = wide(ids)[0, IDS.shape[1] - 1 : -1]
    chosen = logits.gather(1, ids[0, IDS.shape[1] :, None])[:, 0]
    assert ((logits.amax(1) - chosen) < 0.05 * logits.std()).all()  # or nearly as good
    layer = kept.model.layers[1]
    if kind is mixed:
        parts = [type(part) for part in layer.qkv_proj.layers]
        assert parts == [Int4Linear, Int4Linear, HalvesLinear]
        assert isinstance(layer.qkv_proj, SideBySide)
        assert isinstance(layer.down_proj, inference.PackedLinear)
    else:
        made = HalvesLinear if kind == KINDS.Q8_0 else Int4Linear
        parts = layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj
        assert {type(part) for part in parts} == {type(kept.lm_head)} == {made}


def test_a_real_model_writes_the_same_text():
    wide, kept = (load("smollm2", "cpu", quantize=q) for q in (None, "stored"))
    prompt = torch.tensor([kept[1].encode("The capital of France is")])
    texts = [m.generate(prompt, 12, temperature=0) for m, _ in (wide, kept)]
    assert torch.equal(*texts)
    with torch.no_grad():
        assert off(kept[0](prompt), wide[0](prompt)) < 0.04  # rounded anew: 0.08


def test_eight_bits_keep_their_levels():
    """All 256 levels come back; a scale that bfloat16 has makes them exact."""
    levels = torch.arange(256).to(torch.uint8).view(8, 1, 32)
    scales = torch.full((8, 1, 1), 0.25, dtype=torch.float16).view(torch.uint8)
    rows = torch.cat((scales.view(8, 1, 2), levels), dim=2).flatten(1)
    layer = gguf_layer(rows, "Q8_0", "stored")
    wanted = levels.view(torch.int8).float().flatten(1) / 4
    assert torch.equal(layer.dequantize(), wanted)
    x = torch.eye(32).bfloat16()
    for found in (layer(x), layer(x[:1])):
        torch.testing.assert_close(found.float(), wanted.T[: len(found)])


def tensors_of(model):
    return [*model.parameters(), *model.buffers()]


def laid_out_bytes(model):
    parts = [part for layer in model.model.layers for part in vars(layer).values()]
    modules = [model, *(part for part in parts if isinstance(part, torch.nn.Module))]
    tensors = {id(t): t for m in modules for t in tensors_of(m)}
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_wide_matrices_are_never_there(shape, tmp_path, monkeypatch):
    widened, true = [], gguf_module._dequantize
    monkeypatch.setattr(
        gguf_module,
        "_dequantize",
        lambda tensor, where: widened.append(where) or true(tensor, where),
    )
    path = written(tmp_path / "m.gguf", KINDS.Q4_0, shape)
    file = read_gguf(path)
    model, _ = load_gguf_stored(file)
    names = [where.rpartition(": ")[2] for where in widened]
    assert all("norm" in n or "bias" in n or n == "token_embd.weight" for n in names)
    assert not any(tensor.is_meta for tensor in tensors_of(model))
    size = sum(tensor.nbytes for tensor in tensors_of(model))
    embedding = model.model.embed_tokens.weight.nbytes
    rows = sum(tensor.data.nbytes for tensor in file.tensors.values())
    assert size < rows + embedding + 4096
    before = {type(module) for module in model.modules()}
    assert Blocks in before and torch.nn.Linear not in before
    optimize_for_inference(model)
    promised = stored_bytes(file, torch.float32)
    # rows fill blocks of 64
    assert 0.9 * promised < laid_out_bytes(model) < 1.2 * promised
    wide, _ = load_gguf(path)
    assert promised - embedding < 0.3 * sum(p.nbytes for p in wide.parameters())


def test_the_memory_is_that_of_what_is_kept(tmp_path, monkeypatch):
    path = written(tmp_path / "m.gguf", KINDS.Q4_0)
    asked = []
    monkeypatch.setattr(
        loading, "require_memory", lambda size, *rest: asked.append(size)
    )
    load(path, "cpu", quantize="stored")
    load(path, "cpu")
    assert asked[0] == stored_bytes(read_gguf(path), torch.float32) < asked[1] / 2


def test_what_is_kept_is_said_in_a_line(tmp_path, capsys):
    path = written(tmp_path / "m.gguf", mixed)
    load(path, "cpu", quantize="stored")
    out, err = capsys.readouterr()
    assert not out and err == (
        f"note: {path}: kept as stored: 11 Q4_1, 3 Q8_0; widened: 11 F32, 1 Q4_1,"
        " 1 Q5_0\n"
    )


def test_refusals(tmp_path):
    path = written(tmp_path / "m.gguf", KINDS.F16)
    with pytest.raises(
        ValueError, match="no matrix is of a type that can be kept"
    ) as e:
        load(path, "cpu", quantize="stored")
    assert "only 16 F16, 11 F32: quantize to int8 or int4" in one_line(e)
    checkpoint = save_checkpoint(tmp_path / "step_1", small(), TOKENIZER)
    with pytest.raises(ValueError, match="is no GGUF file, which alone") as e:
        load(checkpoint, "cpu", quantize="stored")
    assert one_line(e).startswith(str(checkpoint))
    with pytest.raises(ValueError, match="int8, int4 or stored, not 'int2'"):
        load(tmp_path / "nothing", quantize="int2")
    with pytest.raises(ValueError, match="^type Q6_K cannot be kept as it is stored$"):
        gguf_layer(torch.zeros(2, 210, dtype=torch.uint8), "Q6_K", "stored")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q8_0"])
def test_damaged_scales_are_refused(kind):
    size = library.GGML_QUANT_SIZES[KINDS[kind]][1]
    rows = torch.full((2, size), 255, dtype=torch.uint8)  # nan in float16
    with pytest.raises(ValueError, match="not finite cannot be quantized"):
        gguf_layer(rows, kind, "stored")


def test_commands_take_it(tmp_path, capsys):
    path = written(tmp_path / "m.gguf", KINDS.Q8_0)
    text = tmp_path / "texts.jsonl"
    text.write_text('{"text": "The cat sat on the mat."}\n')
    model = ["--model", str(path), "--quantize", "stored"]
    options = ["--max-new-tokens", "3", "--temperature", "0"]
    assert main(["generate", "The cat", *model, *options]) == 0
    assert main(["eval", *model, "--data", str(text), "--heldout-fraction", "1"]) == 0
    out, err = capsys.readouterr()
    assert "The cat" in out and "bits per byte" in out
    assert err.count("kept as stored: 15 Q8_0") == 2


TRUE = {
    name: getattr(where, name)
    for where, name in (
        (gguf_module, "_our_row_order"),
        (module, "q8_0_groups"),
        (module, "q4_1_groups"),
        (inference, "_of_blocks"),
    )
}


def file_order(name, weight, *args):
    bytes_of = weight.dtype == torch.uint8
    return weight if bytes_of else TRUE["_our_row_order"](name, weight, *args)


def changed(name, change):
    def mutant(blocks):
        return change(*TRUE[name](blocks))

    return mutant


def halves_swapped(levels, scales, zeros):
    high, low = levels.chunk(2, dim=1)
    return torch.cat((low, high), dim=1), scales, zeros


def backwards(make, *linears):
    return TRUE["_of_blocks"](make, *reversed(linears))


def without_bias(make, *linears):
    layer = TRUE["_of_blocks"](make, *linears)
    for part in layer.modules():
        part.bias = None
    return layer


def head_of_a_norm(names, file):
    kept = KEPT(names, file)
    return {
        n: t for n, t in kept.items() if n != "model.layers.1.mlp.up_proj.weight"
    } | {
        "model.layers.1.mlp.up_proj.weight": names[
            "model.layers.1.mlp.gate_proj.weight"
        ]
    }


KEPT = gguf_module._kept
MUTANTS = {
    "rows in the file's order": (gguf_module, "_our_row_order", file_order),
    "another matrix": (gguf_module, "_kept", head_of_a_norm),
    "halves swapped": ("Q8_0", changed("q8_0_groups", halves_swapped)),
    "low halves off by eight": (
        "Q8_0",
        changed("q8_0_groups", lambda q, s, z: (q, s, 0 * z)),
    ),
    "halves of one weight": (
        "Q8_0",
        changed("q8_0_groups", lambda q, s, z: (q, s.roll(1, 1), z)),
    ),
    "no least value": ("Q4_1", changed("q4_1_groups", lambda q, s, z: (q, s, 0 * z))),
    "stacked backwards": (inference, "_of_blocks", backwards),
    "dropped bias": (inference, "_of_blocks", without_bias),
}


@pytest.mark.mutant
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, tmp_path, monkeypatch):
    *where, broken = MUTANTS[name]
    if len(where) == 1:
        monkeypatch.setitem(module.STORED, where[0], broken)
    else:
        monkeypatch.setattr(*where, broken)
    found = []
    for shape in SHAPES:
        for kind in (KINDS.Q4_1, KINDS.Q8_0, mixed):
            try:
                found.append(distance(written(tmp_path / "m.gguf", kind, shape)))
            except RuntimeError:
                found.append(1.0)
    assert max(found) > 0.1
