"""Conversations as training data, beside transformers and TRL; runs that are killed."""

import json
import shutil
from pathlib import Path

import datasets
import jinja2
import numpy as np
import pytest
import torch
import trl
from helpers import refused
from training import (  # noqa: F401
    distance,
    entries,
    final_weights,
    folder,
    read_the_same,
    run,
    same,
    settings,
    train_on,
    training_state,
)
from safetensors.torch import load_file
from weights_helpers import TOKENIZER, small

from qwen_analog import QwenForCausalLM, load
from qwen_analog.archive import CheckpointError
from qwen_analog.attention import document_mask
from qwen_analog.batches import open_data
from qwen_analog.chat_template import chat_ids, has_chat_format
from qwen_analog.checkpoint import load_checkpoint, load_model, save_checkpoint
from qwen_analog.cli import main
from qwen_analog.corpora import first_sentence
from qwen_analog.distributed import DistributedContext
from qwen_analog.finetune import (
    ChatDataset,
    ChatStream,
    answer_end,
    answer_spans,
    chat_datasets,
    encode_conversation,
    encode_turns,
    fill_rows,
    join,
    open_conversations,
    read_conversations,
)
from qwen_analog.hf_tokenizer import HFTokenizer
from qwen_analog.jsonl import DataError
from qwen_analog.lora import load_lora
from qwen_analog.loss import IGNORE_INDEX
from qwen_analog.monitor import documents_of_step
from qwen_analog.train import train

pytest_plugins = ["weights_helpers"]

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CONVERSATIONS = [
    [("user", "Hi"), ("assistant", "Hello!")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?")],
    [("user", "a"), ("assistant", "b\nc"), ("user", "d"), ("assistant", "e")],
    [("user", "one"), ("user", "two"), ("assistant", "three")],
    [("user", "<|im_end|>"), ("assistant", "no <|im_start|> here <|im_end|>")],
]


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def with_template(files, text):
    tokenizer = HFTokenizer(files)
    tokenizer.tokenizer.chat_template = text
    return tokenizer


def learned(tokenizer, turns):
    ids, spans = answer_spans(tokenizer, messages(turns), answer_end(tokenizer))
    mask = np.zeros(len(ids), int)
    for span in spans:
        mask[span] = 1
    return ids, mask.tolist()


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.mark.parametrize("turns", CONVERSATIONS[:-1])
@pytest.mark.parametrize("template", [MARKED, "qwen2_5_training.jinja"])
def test_the_learned_tokens_are_those_of_transformers(turns, template, tokenizer_files):
    if template.endswith(".jinja"):
        template = (TEMPLATES / template).read_text()
    tokenizer = with_template(tokenizer_files, template)
    theirs = tokenizer.tokenizer.apply_chat_template(
        messages(turns), return_assistant_tokens_mask=True, return_dict=True
    )
    ids, mask = learned(tokenizer, turns)
    assert (ids, mask) == (theirs["input_ids"], theirs["assistant_masks"])


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_prefixes_find_what_marks_say(turns, tokenizer_files):
    """Without marks the answers are found by rendering prefixes: the same tokens."""
    marked = learned(with_template(tokenizer_files, MARKED), turns)
    assert learned(with_template(tokenizer_files, UNMARKED), turns) == marked
    ids, mask = learned(TOKENIZER, turns)  # Qwen's form, without a template
    answers = [text for role, text in turns if role == "assistant"]
    said = TOKENIZER.decode([i for i, m in zip(ids, mask) if m])
    assert said == "".join(f"{answer}<|im_end|>" for answer in answers)


def _ids_and_mask(rendered):
    return {name: rendered[name] for name in ("input_ids", "assistant_masks")}


def test_the_collated_labels_are_trls(tokenizer_files):
    """TRL packs whole conversations too; its labels of padding are -100 as well."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = with_template(tokenizer_files, MARKED)
    end = answer_end(tokenizer)
    turns = [messages(c) for c in CONVERSATIONS[:-1]]
    examples = [encode_conversation(tokenizer, m, end) for m in turns]
    rendered = [
        tokenizer.tokenizer.apply_chat_template(
            m, return_assistant_tokens_mask=True, return_dict=True
        )
        for m in turns
    ]
    labelled = [
        {
            "input_ids": r["input_ids"][: len(e.ids)],  # without what stands behind
            "labels": [i if m else -100 for i, m in zip(*r.values())][: len(e.ids)],
        }
        for r, e in zip(map(_ids_and_mask, rendered), examples)
    ]
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(
        labelled
    )
    row = join(examples, sum(map(len, examples)) + 3)
    # their labels are shifted in the model, ours in the data
    inside = theirs["position_ids"][0][1:] != 0
    labels = theirs["labels"][0][1:][inside]
    positions = theirs["position_ids"][0][:-1][inside]
    assert torch.equal(row.input_ids[:-3], theirs["input_ids"][0][:-1][inside])
    assert torch.equal(row.targets[:-3], labels)
    starts = row.document_ids.diff(prepend=torch.tensor([-1])) != 0
    assert torch.equal(starts[:-3], positions == 0)
    assert (row.targets[-3:] == IGNORE_INDEX).all() and starts[-3]


FRAMES = (
    "<|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn>"
    " <|end|> <|user|> <|assistant|> <|system|> <s>"
).split()
SHAPES = [
    *CONVERSATIONS[:-1],
    [("user", "one"), ("assistant", "two"), ("assistant", "three")],
    [("assistant", "I begin.")],
    [
        ("user", "a"),
        ("assistant", "b"),
        ("system", "s"),
        ("user", "d"),
        *[("assistant", "e")],
    ],
    [("user", ""), ("assistant", "b")],
    [
        ("user", "a"),
        ("assistant", "<think>\nhm\n</think>\n\nb"),
        ("user", "d"),
        *[("assistant", "<think>\nhmm\n</think>\n\ne")],
    ],
    [("user", " a\n"), ("assistant", " b \n")],
    [("user", "a"), ("assistant", "\nb")],
    [
        ("user", "\u4f60\u597d \U0001f9d1\u200d\U0001f680"),
        ("assistant", "e\u0301 \u200b x"),
    ],
    [("user", "a"), ("assistant", "b"), ("user", "never answered")],
]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def others_files(tokenizer_files, tmp_path_factory):
    """A tokenizer that knows the control tokens of other families."""
    fast = HFTokenizer(tokenizer_files).tokenizer
    fast.add_special_tokens({"additional_special_tokens": FRAMES, "bos_token": "<s>"})
    place = tmp_path_factory.mktemp("others")
    fast.save_pretrained(place)
    return place


def as_transformers(tokenizer, turns, **more):
    """Ids (and the mask) by transformers; None where the template refuses."""
    try:
        return tokenizer.tokenizer.apply_chat_template(
            messages(turns), return_dict=True, **more
        )
    except jinja2.TemplateError:
        return None


FAMILIES = "qwen2_5 qwen3 qwen3_instruct_2507 llama3 gemma gemma3 phi3".split()


@pytest.mark.parametrize("family", FAMILIES)
def test_marked_templates_of_other_families_are_transformers(family, others_files):
    """Odd shapes: what TRL's template takes has its mask, else it is refused."""
    template = (TEMPLATES / f"{family}_training.jinja").read_text()
    tokenizer, taken = with_template(others_files, template), 0
    for turns in SHAPES:
        theirs = as_transformers(tokenizer, turns, return_assistant_tokens_mask=True)
        try:
            ours = learned(tokenizer, turns)
        except ValueError as error:
            melts = turns[-1][1].startswith("\n") and "within a token" in str(error)
            assert melts or theirs is None and "does not take" in str(error)
            continue
        taken += 1
        assert ours == (theirs["input_ids"], theirs["assistant_masks"]), turns
    assert taken >= 7


@pytest.mark.parametrize("family", [*FAMILIES, MISTRAL])
def test_unmarked_templates_are_trained_as_they_are_used(family, others_files):
    """Each example is what transformers writes up to an answer, which alone, or with
    those before it, is learned.
    """
    template = family
    if family in FAMILIES:
        template = (TEMPLATES / f"{family}.jinja").read_text()
    tokenizer = with_template(others_files, template)
    end, split = answer_end(tokenizer), 0
    for turns in SHAPES:
        try:
            examples = encode_turns(tokenizer, messages(turns), end)
        except ValueError as error:
            said = str(error)
            refused = as_transformers(tokenizer, turns) is None and "not take" in said
            opens = turns[0][0] == "assistant" and said.startswith("message 1: ")
            melts = turns[-1][1].startswith("\n") and "begin this answer" in said
            # Qwen3 does not write twice in a row, once it has thought
            twice = family == "qwen3" and turns == SHAPES[4]
            assert refused or opens or melts or twice, (turns, said)
            continue
        answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
        split += len(examples) > 1
        for i, example in zip(answers[-len(examples) :], examples):
            told = as_transformers(tokenizer, turns[: i + 1])["input_ids"]
            asked = {"input_ids": chat_ids(tokenizer, [])} if i == 0 else None
            more = {"add_generation_prompt": True}
            asked = asked or as_transformers(tokenizer, turns[:i], **more)
            assert example.ids.tolist() == told[: len(example.ids)]
            assert example.ids[-1] == end and end not in told[len(example.ids) :]
            place = len(asked["input_ids"])
            assert example.learned[place:].all() and not example.learned[place - 1]
            earlier = (example.ids[:place] == end) & example.learned[:place]
            assert earlier.sum() == (len(answers) - 1) * (len(examples) == 1)
    assert split == (3 if family == "qwen3" else 0)


def test_templates_that_cannot_be_trained_on_are_refused(tokenizer_files):
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="no control token ends an answer"):
        answer_end(with_template(tokenizer_files, endless))
    other = UNMARKED.replace("_prompt %}<|im_start|>assistant", "_prompt %}assistant")
    with pytest.raises(ValueError, match="asks for an answer otherwise"):
        answer_end(with_template(tokenizer_files, other))
    forgets = UNMARKED.replace("in messages", "in messages[-2:]")
    with pytest.raises(ValueError, match="message 2: .* otherwise once more follows"):
        learned(with_template(tokenizer_files, forgets), CONVERSATIONS[2])
    unended = MARKED.replace(
        "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
    )
    with pytest.raises(ValueError, match="no control token ends an answer"):
        answer_end(with_template(tokenizer_files, unended))


BAD = [
    ("{", "not JSON"),
    ("[]", "not a JSON object"),
    ('{"text": "x"}', 'no field "messages"'),
    ('{"messages": {}}', '"messages" is not a list'),
    ('{"messages": []}', "nothing to learn"),
    ('{"messages": ["x"]}', "message 1: not a JSON object"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "message 1: its role is 'ro"),
    ('{"messages": [{"role": "user", "content": ["x"]}]}', "a part that is no text"),
    ('{"messages": [{"role": "user", "content": null}]}', "not text but null"),
    ('{"messages": [{"role": "user", "content": 3}]}', "not text but of type int"),
    (
        '{"messages": [{"role": ["user"], "content": "x"}]}',
        "message 1: its role is ['u",
    ),
    ('{"messages": [{"role": "assistant", "content": []}]}', "the assistant says no"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"),
    ('{"prompt": "x", "completion": ""}', "message 2: the assistant says nothing"),
    ('{"prompt": "x", "completion": "y", "tools": [3]}', '"tools" is no list'),
    ('{"prompt": "x", "completion": "y", "documents": [{}]}', "leave such a line out"),
    ('{"prompt": "x", "completion": "\\nyes"}', "message 2: the chat template does"),
    ('{"prompt": "x", "completion": "\\ud800"}', "half a surrogate pair"),
    (json.dumps({"prompt": "x", "completion": "y " * 99}), "more than sequence_length"),
    (json.dumps({"prompt": "x", "completion": "y" * 9999}), "more than sequence_len"),
    (json.dumps({"prompt": "x", "completion": "y" * 2**20}), "longer than a sequence"),
]
ANSWER = {"role": "assistant", "content": "x"}
IMAGE = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {}}]
for field, value in (
    ("tool_calls", [{"function": {"name": "f", "arguments": "{"}}]),
    ("tool_call_id", "a"),
    ("reasoning_content", "hm"),
    ("weight", 0),
    ("content", IMAGE),
):
    wrong = json.dumps({"messages": [ANSWER, {**ANSWER, field: value}]})
    said = {
        "content": "its content holds",
        "tool_calls": '"arguments" of the call of f',
    }
    BAD.append((wrong, "message 2: " + said.get(field, f'"{field}"')))


@pytest.mark.parametrize("line, reason", BAD)
def test_a_bad_line_is_named(line, reason, tmp_path):
    good = json.dumps({"prompt": "x", "completion": "y"})
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(DataError) as caught:
        read_conversations([str(path)], TOKENIZER, 110)
    said = str(caught.value)
    assert said.startswith(f"{path}, line 2: ") and reason in said and "\n" not in said
    examples, skipped = read_conversations([str(path)], TOKENIZER, 110, True)
    assert len(examples) == 2 and reason in skipped[0]
    path.write_text(line + "\n")
    with pytest.raises(DataError, match="no conversation in"):
        read_conversations([str(path)], TOKENIZER, 110, True)


def test_odd_shapes_that_are_taken(tmp_path):
    turns = [
        [("system", ""), ("user", "a"), ("assistant", "b")],
        [("user", "a"), ("assistant", "b"), ("user", "never answered")],
        [("assistant", "I begin.")],
        [("user", "a"), ("assistant", "b"), ("assistant", "c"), ("system", "d")],
        [("user", ""), ("assistant", "b")],
        [
            ("user", "na\u00efve \U0001f9d1\u200d\U0001f680"),
            ("assistant", "e\u0301 \ue000"),
        ],
    ]
    lines = [{"messages": messages(t), "id": 7} for t in turns]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = [{"role": "user", "content": parts, "name": None, "weight": 1}]
    answered = [{"role": "assistant", "content": "b", "tool_calls": []}]
    lines += [{"prompt": asked, "completion": answered, "tools": None}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    examples, _ = read_conversations([str(path)], TOKENIZER, 200)
    end = answer_end(TOKENIZER)
    assert [int((e.ids[e.learned] == end).sum()) for e in examples] == [
        *(1, 1, 1, 2, 1, 1, 1)
    ]
    assert all(e.learned[-1] and e.ids[-1] == end for e in examples)
    assert "user\nab<" in TOKENIZER.decode(examples[-1].ids.tolist())


def test_rows_hold_whole_conversations_once_an_epoch(tmp_path):
    lengths = [5, 3, 8, 1, 2, 7]
    rows = fill_rows(lengths, [5, 0, 1, 2, 3, 4], 8)
    assert rows == [[5], [0, 1], [2], [3, 4]]
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": "x", "completion": "y" * n}) + "\n" for n in range(9)
        )[len(json.dumps({"prompt": "x", "completion": ""})) + 1 :]
    )
    examples, _ = read_conversations([str(path)], TOKENIZER, 200)
    data, held = chat_datasets(examples, 200, seed=1, fraction=0.3)
    assert held and len(data.examples) + len(held.examples) == 8
    assert not {e.key for e in data.examples} & {e.key for e in held.examples}
    for epoch in range(3):
        first = sum(len(data.epoch_rows(e)) for e in range(epoch))
        sequences = [data[first + k] for k in range(len(data.epoch_rows(epoch)))]
        sources = [source for s in sequences for source in s.sources]
        assert sorted(sources) == [e.source for e in data.examples]
        assert sum(int((s.targets != IGNORE_INDEX).sum()) for s in sequences) == (
            data.tokens_per_epoch
        )
    assert data.epoch_rows(0) != data.epoch_rows(1)
    again = ChatDataset(data.examples, 200, seed=1)
    again.load_state_dict({"position": 2})
    taken = data.take(4)
    assert [s.sources for s in again.take(2)] == [s.sources for s in taken[2:]]


def test_it_is_said_what_is_left_out_and_what_is_divided(
    others_files, tmp_path, capsys
):
    template = (TEMPLATES / "qwen3.jinja").read_text()
    tokenizer = with_template(others_files, template)
    lines = [{"messages": messages(turns)} for turns in SHAPES[2:6]]
    lines += [{"prompt": "x", "completion": "y" * 99}, {"prompt": "x"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = chat_settings(data=[str(path)], skip_bad_lines=True, heldout_fraction=0.5)
    with DistributedContext() as context:
        data, held_out = open_data(config, tokenizer, context)
    said = capsys.readouterr().err
    assert "skipped 4 bad lines, the first" in said and "chat.jsonl, line 3: " in said
    assert "2 conversations became 3 examples" in said
    sides = [{e.source for e in part.examples} for part in (data, held_out)]
    assert len(data.examples) + len(held_out.examples) == 3 and not sides[0] & sides[1]


def test_packed_conversations_do_not_see_each_other():
    """A row's loss is the sum of its conversations' own."""
    end = answer_end(TOKENIZER)
    turns = [[("system", ""), ("user", "a" * n), ("assistant", "b")] for n in (1, 3)]
    examples = [encode_conversation(TOKENIZER, messages(t), end) for t in turns]
    model = small().double()

    def loss(batch):
        row = {k: getattr(batch, k)[None] for k in ("input_ids", "targets")}
        ids = batch.document_ids[None]
        return model(**row, document_ids=ids, reduction="sum").item()

    row = join(examples, sum(map(len, examples)) + 5)
    alone = sum(loss(join([e], len(e))) for e in examples)
    assert loss(row) == pytest.approx(alone, rel=1e-9)
    together = row.document_ids.zero_()
    assert document_mask(together[None]).any()
    assert loss(row) != pytest.approx(alone, rel=1e-6)


@pytest.fixture
def conversations(folder):  # noqa: F811
    """A model to begin with, and conversations of unequal length."""
    lines = [
        {
            "messages": messages(
                [
                    ("system", ""),
                    ("user", f"{i}?"),
                    ("assistant", f"{i}!" * (1 + i % 4)),
                ]
            )
        }
        for i in range(60)
    ]
    Path("chat.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    save_checkpoint("base", small(max_position_embeddings=200), TOKENIZER)
    return folder


def chat_settings(**changes):
    values = settings(format="chat", data=["chat.jsonl"], sequence_length=64)
    given = values.model_dump(exclude={"model", "tokenizer"}, exclude_unset=True)
    return type(values).create(given | changes)


def test_resumed_equals_uninterrupted_bit_for_bit(conversations):
    train(chat_settings(output_dir="whole"), init_from="base")
    shutil.copytree("whole", "checkpoints")
    for gone in ("final", "step_6"):
        shutil.rmtree(f"checkpoints/{gone}", ignore_errors=True)
    shutil.rmtree("checkpoints/step_4")  # killed behind step 2
    train(chat_settings(), "auto", from_checkpoint=True)
    whole, resumed = training_state("whole/final"), training_state("checkpoints/final")
    for name, weight in whole["model_state_dict"].items():
        assert torch.equal(weight, resumed["model_state_dict"][name]), name
    assert whole["data"] == resumed["data"] == {"position": 24}
    assert read_the_same("whole", "checkpoints")
    base, _ = load_model("base")
    assert not torch.equal(
        final_weights("whole")["model.norm.weight"], base.model.norm.weight
    )


def test_the_model_ends_where_answers_do(conversations):
    train(chat_settings(), init_from="base")
    model, tokenizer = load_model("checkpoints/final")
    assert model.generation_config.eos_token_id[0] == answer_end(tokenizer)


def test_other_runs_are_refused(conversations, capsys):
    chat = ["--data", "chat.jsonl", "--config", "chat.json"]
    Path("chat.json").write_text(chat_settings().model_dump_json(exclude_unset=True))
    assert "--init-from" in refused(capsys, "finetune", *chat)
    train(chat_settings(), init_from="base")
    texts = settings(output_dir="texts")
    train(texts)
    said = refused(capsys, "finetune", "--resume", "texts/step_4")
    assert "a run on texts" in said
    again = ["--resume", "checkpoints/step_4", "--output-dir", "other"]
    said = refused(capsys, "train", *again, "--format", "text")
    assert "another format" in said
    again = ["--resume", "checkpoints/step_4", "--output-dir", "other", "--stream"]
    assert "another stream" in refused(capsys, "finetune", *again, "--new-data")


def as_hub(name):
    """The conversations as a data set of the hub, with a column that some rows lack."""
    rows = [json.loads(line) for line in Path("chat.jsonl").read_text().splitlines()]
    rows[3]["messages"][1]["name"] = None
    Path(name, "data").mkdir(parents=True)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(f"{name}/data/train-00000.parquet")
    return f"hf:{name}"


@pytest.mark.parametrize("hub", [False, True])
def test_a_stream_resumes_bit_for_bit(hub, conversations):
    changes = {"stream": not hub, "heldout_fraction": 0.2}
    if hub:
        changes["data"] = [as_hub("owner/chats")]
    train(chat_settings(output_dir="whole", **changes), init_from="base")
    train(chat_settings(output_dir="resumed", **changes), "whole/step_4")
    whole, resumed = training_state("whole/final"), training_state("resumed/final")
    assert same(whole, resumed) and "document" in whole["data"]
    assert read_the_same("whole", "resumed", (5, 6))
    assert any("heldout_bits_per_byte" in entry for entry in entries("whole"))
    sources = {s for step in range(1, 7) for s in documents_of_step("whole", step)}
    assert len(sources) > 20 and all(":" in source for source in sources)


def test_a_stream_has_the_rows_of_the_file(conversations):
    examples, _ = read_conversations(["chat.jsonl"], TOKENIZER, 64)
    rows = fill_rows([len(e) for e in examples], range(len(examples)), 64)
    stream = open_conversations(["chat.jsonl"])
    plain = ChatStream(stream, TOKENIZER, 64, buffer_size=0)
    for row, found in zip(rows[:-1], plain.take(len(rows) - 1)):
        expected = join([examples[i] for i in row], 64)
        assert torch.equal(found.input_ids, expected.input_ids)
        assert torch.equal(found.targets, expected.targets)
        assert found.sources == expected.sources
    mixed = ChatStream(stream, TOKENIZER, 64, 3, 0.3, buffer_size=7)
    held_out = mixed.held_out_dataset(4)
    states, taken = [], []
    for _ in range(60):  # more than an epoch
        states.append(mixed.state_dict())
        taken += mixed.take(1)
    assert len({state["epoch"] for state in states}) > 1
    for k in range(0, 56, 5):
        again = ChatStream(stream, TOKENIZER, 64, 3, 0.3, buffer_size=7)
        again.load_state_dict(states[k])
        assert [s.sources for s in again.take(3)] == [s.sources for s in taken[k:][:3]]
    kept = {example.source for example in held_out.examples}
    assert kept and not kept & {source for s in taken for source in s.sources}
    with pytest.raises(DataError, match="the stream has changed"):
        again.load_state_dict({"epoch": 0, "document": 0, "offset": 5})


def test_a_stream_resumes_within_a_conversation(others_files, tmp_path):
    """Qwen3's template makes an example of each answer; a row may end between them."""
    tokenizer = with_template(others_files, (TEMPLATES / "qwen3.jinja").read_text())
    turns = [("user", "a"), ("assistant", "b")] * 3
    lines = [{"messages": messages([("system", str(i)), *turns])} for i in range(5)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    examples, _ = read_conversations([str(path)], tokenizer, 200)
    assert len(examples) == 15
    room = len(examples[0]) + len(examples[1]) + 1

    def opened():
        stream = open_conversations([str(path)])
        return ChatStream(stream, tokenizer, max(room, len(examples[2])), buffer_size=0)

    reading, states, taken = opened(), [], []
    for _ in range(8):
        states.append(reading.state_dict())
        taken += reading.take(1)
    assert {state["offset"] for state in states} == {0, 2}
    for k, state in enumerate(states):
        again = opened()
        again.load_state_dict(state)
        for row, found in zip(taken[k:], again.take(3)):
            assert torch.equal(row.input_ids, found.input_ids)
            assert row.sources == found.sources


def test_bad_lines_of_a_stream_are_named_or_counted(conversations, capsys):
    def opened(skip):
        stream = open_conversations(["chat.jsonl"], skip)
        return ChatStream(stream, TOKENIZER, 64, buffer_size=0, skip_bad_lines=skip)

    lines = Path("chat.jsonl").read_text().splitlines()
    for k, bad in ((5, '{"text": "x"}'), (7, '{"prompt": "x", "completion": "%s"}')):
        lines[k] = bad.replace("%s", "y " * 99)
        Path("chat.jsonl").write_text("\n".join(lines))
        with pytest.raises(DataError, match="chat.jsonl, line 6: .*no field .messages"):
            opened(False).take(9)
    assert sum(len(s.sources) for s in opened(True).take(9)) > 8
    said = capsys.readouterr().err
    assert "skipped 1 bad lines so far, the last chat.jsonl:6: no field" in said
    Path("chat.jsonl").write_text("\n".join(lines[7:]))
    with pytest.raises(DataError, match="chat.jsonl, line 1: .* more than sequence_l"):
        opened(False).take(1)
    Path("chat.jsonl").write_text(lines[5])
    with pytest.raises(DataError, match="no conversation to train on"):
        opened(True).take(1)


LORA = {"lora_rank": 2, "lora_targets": ["q_proj", "down_proj"], "learning_rate": 0.05}


def test_adapters_resume_exactly_and_open_merged(conversations):
    train(chat_settings(output_dir="whole", **LORA), init_from="base")
    shutil.copytree("whole", "checkpoints")
    for gone in ("final", "step_4", "adapter"):
        shutil.rmtree(f"checkpoints/{gone}")
    train(chat_settings(**LORA), "auto", from_checkpoint=True)
    whole, resumed = final_weights("whole"), final_weights("checkpoints")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    base, _ = load_model("base")
    before = base.state_dict()
    assert all(torch.equal(whole[name], before[name]) for name in before)  # frozen
    thin = {name for name in whole if "lora" in name}
    assert len(thin) == 2 * 2 * base.config.num_hidden_layers

    # a checkpoint opens merged, as the adapters of PEFT's files over the base
    merged, _ = load_model("checkpoints/final")
    assert merged.state_dict().keys() == before.keys()
    load_lora(base, "checkpoints/adapter")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(base(ids), merged(ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(load_model("base")[0](ids), merged(ids), atol=1e-3)
    exported = QwenForCausalLM.from_pretrained("checkpoints/final")
    assert torch.equal(exported(ids), merged(ids))
    files = load_file("checkpoints/final/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(files[name], merged.state_dict()[name])
    assert not any("lora" in name for name in files)


def test_the_adapter_converses_as_the_final_model_does(conversations):
    assert not has_chat_format(*load("base"))
    train(chat_settings(**LORA), init_from="base")
    final, tokenizer = load("checkpoints/final")
    model, _ = load("checkpoints/adapter")
    assert has_chat_format(model, tokenizer)
    assert model.generation_config == final.generation_config
    assert model.generation_config.eos_token_id[0] == answer_end(tokenizer)
    # a run that goes on from the adapter
    train(chat_settings(output_dir="on", **LORA), init_from="checkpoints/adapter")
    on, _ = load("on/adapter", base="base")
    assert on.generation_config == final.generation_config


MEASURED = ("loss", "grad_norm", "learning_rate", "tokens", "heldout_loss")


def test_killed_in_a_step_and_in_a_save(conversations):
    """SIGKILL between gradients and weights, then with half a checkpoint written: what
    the run ends with, and all that it logged, is what it would have been.
    """
    runs = {"full": {}, "thin": LORA}
    for name, more in runs.items():
        train(chat_settings(output_dir=f"whole-{name}", **more), init_from="base")
        config = chat_settings(output_dir=name, **more)
        Path(f"{name}.json").write_text(config.model_dump_json(exclude_unset=True))
    worker = Path(__file__).with_name("killed_worker.py")
    done = run(worker, "full.json", "thin.json")
    assert done.returncode == 0, done.stderr[-2000:]
    for name, more in runs.items():
        left = {path.name for path in Path(name).glob("step_*")}
        assert left == {"step_2", "step_4.partial"}
        train(chat_settings(output_dir=name, **more), "auto")
        whole = f"whole-{name}"
        assert same(training_state(f"{name}/final"), training_state(f"{whole}/final"))
        assert read_the_same(name, whole)
        logged = [
            {tuple(entry.get(n) for n in ("step", *MEASURED)) for entry in entries(at)}
            for at in (name, whole)
        ]  # a step that was taken twice had the same numbers twice
        assert logged[0] == logged[1] and len(logged[0]) > 6
        files = [path.name for path in Path(whole).glob("*/*.safetensors")]
        for path in Path(whole).glob("*/*.safetensors"):
            copy = Path(name, *path.parts[1:])
            assert copy.read_bytes() == path.read_bytes(), path
        assert files.count("adapter_model.safetensors") == (name == "thin")


def test_what_adapters_cannot_do_is_refused(conversations, capsys):
    for changes, said in (
        ({"lora_targets": ["lm_head"]}, "lm_head is none of"),
        ({"lora_targets": []}, "at least 1 item"),
    ):
        with pytest.raises(ValueError, match=said):
            chat_settings(lora_rank=2, **changes)
    with pytest.raises(ValueError, match="adapters need a model"):
        train(settings(lora_rank=2))
    with pytest.raises(ValueError, match="adapters are float32"):
        train(chat_settings(lora_rank=2, precision="bf16-pure"), init_from="base")
    train(chat_settings(**LORA), init_from="base")
    with pytest.raises(CheckpointError, match="another lora_rank"):
        changes = dict(LORA, lora_rank=4, output_dir="other", max_steps=9)
        train(chat_settings(**changes), "checkpoints/final", from_checkpoint=True)


def test_adapters_are_one_on_any_layout(conversations):
    train(chat_settings(output_dir="one", **LORA), init_from="base")
    config = chat_settings(
        output_dir="two", parallel="fsdp", micro_batch_size=2, **LORA
    )
    Path("two.json").write_text(config.model_dump_json(exclude_unset=True))
    arguments = ["--config", "two.json", "--init-from", "base"]
    train_on(2, *arguments)
    assert distance(final_weights("one"), final_weights("two")) < 1e-4
    assert (Path("two") / "adapter" / "adapter_model.safetensors").is_file()


def test_the_commands_prepare_train_and_answer(conversations, capsys):
    assert main(["prepare", "style", "--output", "style"]) == 0
    rows = [json.loads(x) for x in Path("style/style.jsonl").read_text().splitlines()]
    assert len(rows) == 60
    for row in rows:
        question, answer = row["messages"]
        assert question["role"] == "user" and answer["role"] == "assistant"
        assert answer["content"].endswith("?")
    assert "60 conversations" in capsys.readouterr().out
    assert "exists already" in refused(capsys, "prepare", "style", "--output", "style")

    short = {"max_steps": 2, "sequence_length": 64, "precision": "fp32"}
    Path("short.json").write_text(json.dumps({**short, "sample_tokens": 3}))
    words = ["finetune", "--config", "short.json", "--data", "chat.jsonl"]
    samples = ["--sample-prompts", "1?", "2?", "--tensorboard"]
    assert main([*words, "--init-from", "base", *samples]) == 0
    out = capsys.readouterr().out
    assert out.count("\n> ") == 2
    state = load_checkpoint("finetuned/final")["train_config"]
    assert (state["format"], state["learning_rate"]) == ("chat", 2e-5)
    flags = ["--lora-rank", "2", "--output-dir", "thin"]
    assert main([*words, "--init-from", "base", *flags]) == 0
    assert load_checkpoint("thin/final")["train_config"]["learning_rate"] == 2e-4
    assert main(["finetune", "--resume", "auto"]) == 0  # all done, in finetuned
    assert "nothing to train" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("Rain is water. It falls.", "Rain is water."),
        ("The St. Lawrence is a river. It is long.", "The St. Lawrence is a river."),
        ("In 550 BC. At", "In 550 BC."),
        ("A. A. Milne was\nan author.", "A. A. Milne was."),
        ("It costs 5.5  pounds (3.2 kg). More.", "It costs 5.5 pounds (3.2 kg)."),
    ],
)
def test_the_first_sentence(text, sentence):
    assert first_sentence(text) == sentence
