"""Small models, their files as others write them, and the lines of refusals."""

import json
import math
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from book import scramble_
from helpers import ROOT
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qwen_analog.config import QwenConfig
from qwen_analog.gguf import load_gguf
from qwen_analog.gguf_file import read_gguf
from qwen_analog.hf import save_pretrained
from qwen_analog.model import QwenForCausalLM
from qwen_analog.bpe import train_bpe
from qwen_analog.tokenizer import TiktokenTokenizer
from qwen_analog.tokenizer_json import QWEN_CHAT_TEMPLATE, to_fast


CHAPTER = ROOT / "chapters" / "18_real_weights.ipynb"


def of_the_chapter(*names):
    """Functions that the chapter on real weights defines, and does not export."""
    scope = dict(torch=torch)
    for cell in json.loads(CHAPTER.read_text(encoding="utf-8"))["cells"]:
        source = "\n" + "".join(cell["source"])
        if any(f"\ndef {name}(" in source for name in names):
            exec(source, scope)
    return [scope[name] for name in names]


*_, first_difference = of_the_chapter(
    "relative_error", "record", "inside", "compare", "first_difference"
)

TEXTS = [
    "The cat sat on the mat, and the cats' tails were long.",
    "Привет, как дела? Хорошо, привет!",
    "naïve cafe\u0301 ⅷ 1234 56",
    "你好，世界。世界你好",
    "a  b\n\n\n c\t\td \r\n  ",
    "emoji 🧑‍🚀🚀 and 🇫🇷",
    "don't WON'T we'Ll I'ſ",
    "हिन्दी العربية ไทย 한국어",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    " ",
    "\u2028x\u00a0y\u200b",
]


TOKENIZER = TiktokenTokenizer(train_bpe(TEXTS * 3, 400))


MESSAGES = [
    {
        "role": "user",
        "content": "Is <|im_end|> a token?\n\nAnd <|im_start|>system this?",
    },
    {"role": "assistant", "content": " No. "},
    {"role": "user", "content": "\ue000 fine"},
]


IDS = torch.randint(400, (2, 9), generator=torch.Generator().manual_seed(0))


SIZES = dict(
    vocab_size=430,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=80,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)


QWEN3 = dict(qk_norm=True, attention_bias=False, head_dim=20)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def small(**changes) -> QwenForCausalLM:
    config = QwenConfig(**{**SIZES, "rope_theta": 1e4, **changes})
    return scramble_(QwenForCausalLM(config)).eval()


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory) -> Path:
    """The tokenizer's files, to be put beside a model that transformers writes."""
    return save_pretrained(
        small(), TOKENIZER, tmp_path_factory.mktemp("tokenizer") / "model"
    )


def theirs(
    directory: Path,
    tokenizer_files: Path,
    kind: str,
    tied: bool = False,
    shard: str = "5GB",
    dtype=torch.float32,
    **changes,
) -> torch.nn.Module:
    """A directory as transformers writes it, its model returned."""
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[kind]
    if kind == "mistral":
        changes = {"sliding_window": None, **changes}
    config = config_class(
        **{
            **SIZES,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
            **changes,
        }
    )
    model = scramble_(model_class(config)).eval().to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_files / name, directory)
    return model


def edit(directory: Path, name: str = "config.json", **changes) -> None:
    values = {**json.loads((directory / name).read_text()), **changes}
    (directory / name).write_text(
        json.dumps({key: value for key, value in values.items() if value != "delete"})
    )


def one_line(error) -> str:
    """The message of a refusal, which names what was read."""
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


def rope_factors(config: QwenConfig) -> list[float]:
    """What llama.cpp's converter writes for Llama 3's scaling, pair by pair."""
    scaling, factors = config.rope_scaling, []
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * config.rope_theta ** (i / config.head_dim)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def write_gguf(
    path: Path,
    model: QwenForCausalLM,
    tokenizer: TiktokenTokenizer = TOKENIZER,
    quantise=None,
    **changes,
) -> Path:
    """`model` as llama.cpp's converter writes it.

    `quantise` is a type for all matrices, or gives one for a matrix's name.
    """
    config = model.config
    kind = "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"
    writer = gguf.GGUFWriter(path, changes.get("architecture", kind))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    for key, value in changes.get("extra", {}).items():
        writer.add_key_value(
            f"{kind}.{key}",
            value,
            (
                gguf.GGUFValueType.STRING
                if isinstance(value, str)
                else gguf.GGUFValueType.UINT32
            ),
        )
    fast = json.loads(to_fast(tokenizer).to_str())
    tokens, types = (
        list(fast["model"]["vocab"]),
        [gguf.TokenType.NORMAL] * len(fast["model"]["vocab"]),
    )
    for token in fast["added_tokens"]:
        tokens.append(token["content"])
        types.append(
            gguf.TokenType.USER_DEFINED
            if token["content"] == "<tool_call>"
            else gguf.TokenType.CONTROL
        )
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
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_int32("general.sampling.top_k", 9)
    writer.add_chat_template(QWEN_CHAT_TEMPLATE)
    known = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers
    )
    factors = changes.get("factors")
    if config.rope_scaling is not None:
        factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    for name, weight in model.state_dict().items():
        if (
            name == "lm_head.weight"
            and config.tie_word_embeddings
            or name == changes.get("without")
        ):
            continue
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = (
                config.num_attention_heads
                if "q_proj" in name
                else config.num_key_value_heads
            )
            weight = (
                weight.view(heads, 2, -1, weight.shape[1])
                .transpose(1, 2)
                .reshape(weight.shape)
            )
        data = weight.detach().numpy()
        type_ = quantise(name) if callable(quantise) else quantise
        if type_ is not None and data.ndim == 2:
            writer.add_tensor(
                known.get_name(name, (".weight", ".bias")),
                gguf.quants.quantize(data, type_),
                raw_dtype=type_,
            )
        else:
            writer.add_tensor(known.get_name(name, (".weight", ".bias")), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(value) -> bytes:
    """A value of GGUF's metadata with its type in front; bytes stay as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return (
            struct.pack("<IQ", 10, value)
            if value >= 0
            else struct.pack("<Iq", 11, value)
        )
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + spelled(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(spelled, value))
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


def spelled(text) -> bytes:
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(text)) + text


class Gguf:
    """A small file, taken apart: metadata, the table of tensors and their bytes."""

    def __init__(self, path: Path):
        write_gguf(
            path, small(hidden_size=96, intermediate_size=64, num_hidden_layers=1)
        )
        self.path = path
        _, self.metadata, tensors = read_gguf(path)
        self.table, self.data = [], b""
        for name, tensor in tensors.items():
            self.table.append(
                [name, int(tensor.tensor_type), tensor.shape[::-1], len(self.data)]
            )
            self.data += tensor.data.tobytes() + b"\0" * (-tensor.data.nbytes % 32)

    def content(
        self,
        metadata=None,
        table=None,
        magic=b"GGUF",
        version=3,
        n_tensors=None,
        n_values=None,
    ) -> bytes:
        metadata = list(
            (self.metadata if metadata is None else metadata).items()
            if not isinstance(metadata, list)
            else metadata
        )
        table = self.table if table is None else table
        out = magic + struct.pack(
            "<IQQ",
            version,
            len(table) if n_tensors is None else n_tensors,
            len(metadata) if n_values is None else n_values,
        )
        out += b"".join(spelled(name) + packed(value) for name, value in metadata)
        for name, kind, shape, offset in table:
            out += spelled(name) + struct.pack(
                f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset
            )
        return out + b"\0" * (-len(out) % 32) + self.data

    def refused(self, content: bytes) -> str:
        self.path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_gguf(self.path)
        assert one_line(error).startswith(str(self.path))
        return str(error.value)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return Gguf(tmp_path_factory.mktemp("gguf") / "m.gguf")
