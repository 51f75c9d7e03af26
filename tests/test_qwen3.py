"""Qwen3's shapes and Llama 3's rotation from training to conversation: checkpoints,
presets, chat templates, and the tokenizer of Llama 3's GGUF files.
"""

from pathlib import Path

import gguf
import pytest
import tiktoken
import torch
from chapter_code import from_chapter
from helpers import SHAPE, scramble_
from training import (  # noqa: F401
    distance,
    final_weights,
    folder,
    launched,
    settings,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from weights_helpers import (
    LLAMA3,
    MESSAGES,
    QWEN3,
    TEXTS,
    TOKENIZER,
    edit,
    small,
    theirs,
    write_gguf,
)

import qwen_analog
from qwen_analog.chat import Chat
from qwen_analog.chat_template import chat_ids
from qwen_analog.checkpoint import load_checkpoint
from qwen_analog.gguf import load_gguf
from qwen_analog.hf import load_pretrained, save_pretrained
from qwen_analog.train import train

pytest_plugins = ["weights_helpers"]
KINDS = {"qwen3": QWEN3, "llama": {"attention_bias": False, "rope_scaling": LLAMA3}}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_written_and_read_by_transformers(kind):
    """Trained, resumed to the bit, exported, and read back on both sides."""
    model = {**SHAPE, "vocab_size": 278, **KINDS[kind]}
    train(settings(model=model, output_dir="one"))
    train(settings(model=model, output_dir="two"), resume_from="one/step_4")
    one, two = load_checkpoint("one/final"), load_checkpoint("two/final")
    assert one["config"].items() >= model.items()
    for name, weight in one["model_state_dict"].items():
        assert torch.equal(weight, two["model_state_dict"][name]), name
    ours, tokenizer = qwen_analog.load("one/final")
    if kind == "qwen3":  # the norms have learned
        assert (ours.model.layers[0].self_attn.q_norm.weight != 1).any()
    ids = torch.tensor([tokenizer.encode("12: abc def")])
    save_pretrained(ours, tokenizer, "hf")
    for directory in ("one/final", "hf"):
        reference = AutoModelForCausalLM.from_pretrained(directory)
        assert reference.config.model_type == kind
        assert (reference(ids).logits - ours(ids)).abs().max() < 1e-5
    again, _ = qwen_analog.load("hf")
    assert again.config == ours.config and torch.equal(again(ids), ours(ids))


def test_a_checkpoint_from_before_has_no_norms():
    train(settings(output_dir="one", max_steps=2))
    file = Path("one/final/checkpoint.pt")
    checkpoint = torch.load(file)
    before = qwen_analog.load("one/final")[0]
    del checkpoint["config"]["qk_norm"]
    Path("old").mkdir()
    torch.save(checkpoint, Path("old/checkpoint.pt"))
    for path in Path("one/final").iterdir():
        if path.suffix != ".pt":
            Path("old", path.name).write_bytes(path.read_bytes())
    model, tokenizer = qwen_analog.load("old")
    assert not model.config.qk_norm
    ids = torch.tensor([tokenizer.encode("12: abc")])
    assert torch.equal(model(ids), before(ids))


# in the form of Qwen3's own: thinking is hidden in earlier turns and may be left out
QWEN3_TEMPLATE = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last == messages|length - 1 %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def test_a_qwen3_directory_is_chatted_with(tmp_path, tokenizer_files):
    reference = theirs(tmp_path, tokenizer_files, "qwen3", max_position_embeddings=256)
    (tmp_path / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    edit(tmp_path, "generation_config.json", eos_token_id=[402, 400])
    model, tokenizer = load_pretrained(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "The cat?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOn the mat."},
        {"role": "user", "content": "And the cats?"},
    ]
    expected = auto.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert chat_ids(tokenizer, messages) == list(expected)
    chat = Chat(model, tokenizer, max_new_tokens=5, temperature=0)
    prompt = torch.tensor([chat.prompt("The cat?")])
    said = "".join(chat.reply("The cat?"))
    new = reference.generate(prompt, max_new_tokens=5, do_sample=False)
    new = new[0, prompt.shape[1] :].tolist()
    ends = [i for i, token in enumerate(new) if token in (402, 400)]
    assert said == tokenizer.decode(new[: ends[0]] if ends else new)


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n\n"
    "{{ message.content | trim }}<|im_end|>{% endfor %}"
)


def test_the_tokenizer_of_llama_3s_gguf_files(tmp_path, monkeypatch):
    """It splits numbers by threes and knows no normal form, as tiktoken does with its
    pattern; and its template begins with a token for the beginning.
    """
    monkeypatch.setattr("weights_helpers.QWEN_CHAT_TEMPLATE", LLAMA3_TEMPLATE)
    add_eos = gguf.GGUFWriter.add_eos_token_id

    def add_ends(writer, i):
        writer.add_bos_token_id(401)
        add_eos(writer, i)

    monkeypatch.setattr(gguf.GGUFWriter, "add_eos_token_id", add_ends)
    model = small(**KINDS["llama"], hidden_size=96, num_hidden_layers=1)
    path = write_gguf(tmp_path / "m.gguf", model, pre="llama-bpe")
    again, tokenizer = load_gguf(path)
    ranks = TOKENIZER.encoding._mergeable_ranks
    reference = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    for text in [*TEXTS, "In 1987 and 12345678,9"]:
        assert tokenizer.encode(text) == reference.encode_ordinary(text), text
    ids = chat_ids(tokenizer, MESSAGES)
    assert ids[:2] == [401, 401] and ids.count(402) == len(MESSAGES)
    save_pretrained(again, tokenizer, tmp_path / "hf")
    model, tokenizer = load_pretrained(tmp_path / "hf")
    assert chat_ids(tokenizer, MESSAGES) == ids
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode_ordinary(text), text


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_qwen3_as_one_does(strategy):
    model = {**SHAPE, "vocab_size": 278, **QWEN3}
    train(settings(model=model, output_dir="one"))
    launched(2, model=model, output_dir="two", micro_batch_size=2, parallel=strategy)
    one, two = final_weights("one"), final_weights("two")
    assert distance(one, two) < 1e-4
    trained = "model.layers.0.self_attn.q_norm.weight"
    assert (one[trained] - 1).abs().max() > 0.01


def test_the_taught_experts_are_transformers():
    taught = from_chapter("B79_*.ipynb", "class Experts", {"torch": torch})
    sizes = dict(hidden_size=16, moe_intermediate_size=24, num_experts=6)
    config = Qwen3MoeConfig(**sizes, num_experts_per_tok=2, norm_topk_prob=True)
    config._experts_implementation = "eager"
    reference = scramble_(Qwen3MoeSparseMoeBlock(config))
    ours = taught["Experts"](16, 24, num_experts=6, top_k=2)
    ours.router.weight.data = reference.gate.weight.data
    for expert, gate_up, down in zip(
        ours.experts,
        reference.experts.gate_up_proj.data,
        reference.experts.down_proj.data,
    ):
        expert.gate_proj.weight.data, expert.up_proj.weight.data = gate_up.chunk(2)
        expert.down_proj.weight.data = down
    x = torch.randn(1, 10, 16)  # [B, T, D]
    with torch.no_grad():
        assert torch.allclose(ours(x[0]), reference(x)[0], atol=1e-5)
