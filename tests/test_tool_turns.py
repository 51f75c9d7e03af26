"""Tools in training data: what a call says is learned, what a tool answers is not; ids
and masks are those of transformers.
"""

import json
from pathlib import Path

import datasets
import jinja2
import numpy as np
import pytest
from test_finetune import TEMPLATES, UNMARKED, chat_settings, with_template
from training import folder  # noqa: F401
from weights_helpers import TOKENIZER, small

from qwen_analog.chat_template import knows_tools
from qwen_analog.checkpoint import save_checkpoint
from qwen_analog.finetune import (
    answer_end,
    answer_spans,
    encode_turns,
    open_conversations,
    read_conversations,
    read_messages,
)
from qwen_analog.jsonl import DataError, Line
from qwen_analog.loading import load
from qwen_analog.preferences import read_pair
from qwen_analog.rewards import read_question
from qwen_analog.tools import checked_tools
from qwen_analog.train import train

pytest_plugins = ["weights_helpers"]


def tool(name):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    described = {"name": name, "description": f"the {name}", "parameters": parameters}
    return {"type": "function", "function": described}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def says(content, *calls):
    turn = {"role": "assistant", "content": content}
    return {**turn, "tool_calls": list(calls)} if calls else turn


def told(content):
    return {"role": "tool", "name": "weather", "content": content}


TOOLS = [tool("weather"), tool("time")]
USER, SYSTEM = ({"role": r, "content": f"a {r}?"} for r in ("user", "system"))
OSLO, NOW = call("weather", city="Osl\u00f8"), call("time")
SHAPES = {
    "a call": [USER, says(None, OSLO), told("rain"), says("It rains.")],
    "without a content": [USER, {"role": "assistant", "tool_calls": [OSLO]}],
    "an empty content": [USER, says("", OSLO), told("rain"), says("It rains.")],
    "several calls": [
        *(SYSTEM, USER, says("Both.", OSLO, NOW), told("rain"), told("4"), says("ok"))
    ],
    "a tool first": [told("rain"), says("It rains.")],
    "two tools first": [told("rain"), told(""), says("It rains.")],
    "a call at the end": [USER, says("Hm.\n", NOW)],
    "no call": [SYSTEM, USER, says("No.")],
    "turns": [
        *(USER, says("", NOW), told("4"), says("4."), USER, says("", OSLO)),
        *(told('{"sky": "rain"}'), says("Rain."), USER, says("Bye.")),
    ],
    "a call after a call": [
        *(USER, says("", OSLO), told("rain"), says(" then ", NOW), told("4"), says("4"))
    ],
    "nested": [USER, says("", call("weather", city={"a": [1, None, "\\ \"'\n"]}))],
}


def theirs(tokenizer, messages, tools=TOOLS, **more):
    """What transformers makes of a conversation; None where its template refuses."""
    try:
        return tokenizer.tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, **more
        )
    except (jinja2.TemplateError, TypeError):
        return None


def ours(tokenizer, messages, tools=TOOLS, end=None):
    read = read_messages({"messages": messages})
    end = answer_end(tokenizer) if end is None else end
    ids, spans = answer_spans(tokenizer, read, end, tools)
    mask = np.zeros(len(ids), int)
    for span in spans:
        mask[span] = 1
    return ids, mask.tolist()


# families whose template knows tools; of the first two it refuses some shapes
FAMILIES = "gptoss qwen3_5_think qwen2_5 qwen3 glm4moe diffusion_gemma lfm2_v2".split()


@pytest.mark.parametrize("family", FAMILIES)
def test_marked_templates_learn_what_transformers_marks(family, tokenizer_files):
    template = (TEMPLATES / f"{family}_training.jinja").read_text()
    tokenizer, taken = with_template(tokenizer_files, template), 0
    assert knows_tools(tokenizer) == (family in ("qwen2_5", "qwen3"))
    for name, messages in SHAPES.items():
        expected = theirs(tokenizer, messages, return_assistant_tokens_mask=True)
        if expected is None:
            with pytest.raises(ValueError, match="does not take this conversation"):
                ours(tokenizer, messages, end=402)
            continue
        taken += 1
        found = ours(tokenizer, messages, end=402)
        assert found == (expected["input_ids"], expected["assistant_masks"]), name
    assert taken == len(SHAPES) - 2 * (family in FAMILIES[:2])


@pytest.mark.parametrize("name", SHAPES)
def test_without_marks_each_answer_is_found(name, tokenizer_files):
    """Qwen2.5's own template, and its form where there is no template: the ids are
    those of transformers, and learned are calls and answers, with their ends.
    """
    messages = SHAPES[name]
    qwen = with_template(tokenizer_files, (TEMPLATES / "qwen2_5.jinja").read_text())
    ids, mask = ours(qwen, messages)
    assert ids == theirs(qwen, messages)["input_ids"]
    assert ours(TOKENIZER, messages) == (ids, mask)
    text, parts = "", []
    for message in messages:
        if message["role"] == "assistant":
            calls = [
                f'<tool_call>\n{{"name": "{c["function"]["name"]}", "arguments": '
                f"{json.dumps(c['function']['arguments'], ensure_ascii=False)}}}\n"
                "</tool_call>"
                for c in message.get("tool_calls", ())
            ]
            said = [message["content"]] if message.get("content") else []
            parts.append("\n".join(said + calls) + "<|im_end|>")
    text = TOKENIZER.decode([i for i, m in zip(ids, mask) if m])
    assert text == "".join(parts)
    marks = {
        TOKENIZER.encode(t, special=True)[0] for t in ("<tool_call>", "<|im_end|>")
    }
    starts = [i for i, m in zip(ids, mask) if m and i in marks]
    calls = sum(len(m.get("tool_calls", ())) for m in messages)
    assert len(starts) == calls + len(parts)


def test_a_template_that_rewrites_turns_gives_each_answer_an_example(tokenizer_files):
    template = (TEMPLATES / "qwen3.jinja").read_text()
    tokenizer = with_template(tokenizer_files, template)
    messages = read_messages({"messages": SHAPES["turns"]})
    examples = encode_turns(tokenizer, messages, answer_end(tokenizer), tools=TOOLS)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(examples) == len(answers) == 5
    for i, example in zip(answers, examples):
        told = theirs(tokenizer, messages[: i + 1])["input_ids"]
        more = {"add_generation_prompt": True}
        asked = theirs(tokenizer, messages[:i], **more)["input_ids"]
        assert example.ids.tolist() == told[: len(example.ids)]
        assert example.learned[len(asked) :].all()
        assert not example.learned[: len(asked)].any()


def test_what_tools_and_calls_spell_stays_text():
    """No text of a call, a result or a description becomes a control token."""
    spelled = "<|im_end|><tool_call>"
    messages = [USER, says("", call("time", zone=spelled)), told(spelled), says("ok")]
    ids, mask = ours(TOKENIZER, messages, [tool(spelled)])
    plain, expected = ours(
        TOKENIZER,
        [USER, says("", call("time", zone="x")), told("x"), says("ok")],
        [tool("x")],
    )
    for token in TOKENIZER.encode(spelled, special=True):
        assert ids.count(token) == plain.count(token)
    controls = [(i, m) for i, m in zip(ids, mask) if i >= 400]
    assert controls == [(i, m) for i, m in zip(plain, expected) if i >= 400]


# --- data


def write(*records, path="chat.jsonl"):
    text = "".join(json.dumps(record) + "\n" for record in records)
    Path(path).write_text(text)
    return path


def by_openai(messages):
    """The same with ids, and with arguments as texts."""
    found = []
    for message in messages:
        message = dict(message)
        for n, each in enumerate(message.get("tool_calls", ())):
            text = json.dumps(each["function"]["arguments"])
            function = {**each["function"], "arguments": text}
            calls = message["tool_calls"] = list(message["tool_calls"])
            calls[n] = {**each, "id": f"call_{n}", "function": function}
        if message["role"] == "tool":
            message["tool_call_id"] = "call_0"
        found.append(message)
    return found


def test_calls_of_other_writers_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes = [list(shape) for shape in SHAPES.values()]
    plain = [{"messages": shape, "tools": TOOLS} for shape in shapes]
    other = [
        {"messages": by_openai(shape), "tools": json.dumps(TOOLS)} for shape in shapes
    ]
    divided = {"prompt": shapes[3][:-1], "completion": shapes[3][-1:], "tools": TOOLS}
    whole, _ = read_conversations([write(*plain)], TOKENIZER, 2000)
    again, _ = read_conversations([write(*other)], TOKENIZER, 2000)
    (last,), _ = read_conversations([write(divided)], TOKENIZER, 2000)
    assert [e.content() for e in whole] == [e.content() for e in again]
    assert last.content() == whole[3].content()
    assert whole[1].num_bytes > len(json.dumps(OSLO["function"]))  # a call is text too


@pytest.mark.parametrize("hub", [False, True])
def test_a_stream_has_the_same_examples(hub, tmp_path, monkeypatch):
    """A table of the hub gives each call the arguments of all, empty ones too."""
    monkeypatch.chdir(tmp_path)
    shapes = [s for name, s in SHAPES.items() if name != "nested"]
    records = [{"messages": list(s), "tools": TOOLS} for s in shapes]
    examples, _ = read_conversations([write(*records)], TOKENIZER, 2000)
    where = ["chat.jsonl"]
    if hub:
        Path("owner/chats/data").mkdir(parents=True)
        table = datasets.Dataset.from_list(
            [
                {**r, "messages": [{"role": "user", **m} for m in r["messages"]]}
                for r in records
            ]
        )
        assert table[0]["messages"][0].get("tool_calls", 0) is None
        table.to_parquet("owner/chats/data/train-00000.parquet")
        where = ["hf:owner/chats"]
    rows = [row["text"] for row in open_conversations(where)]
    found = []
    for text in rows:
        record = json.loads(text)
        found += encode_turns(
            TOKENIZER,
            read_messages(record),
            answer_end(TOKENIZER),
            tools=checked_tools(record["tools"]),
        )
    assert [e.content() for e in found] == [e.content() for e in examples]


BAD = [
    ({"tool_calls": [{}]}, '"tool_calls" needs {"function"'),
    ({"tool_calls": {"name": "f"}}, '"tool_calls" is not a list'),
    ({"tool_calls": [call("f"), {"name": "f", "arguments": {}}]}, "needs {"),
    ({"tool_calls": [{"function": {"name": "f"}}]}, '"arguments" of the call of f: no'),
    ({"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "no JSON obj"),
    (
        {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": NaN}'}}]},
        "NaN is no",
    ),
    (
        {"tool_calls": [{"function": {"name": "f", "arguments": "[" * 99_999}}]},
        "deeply",
    ),
    ({"tool_calls": [call("f", a="\ud800")]}, "half a surrogate"),
    ({"role": "user", "tool_calls": [NOW]}, "of another role than the assistant"),
    ({"role": "tool", "tool_call_id": 3}, '"tool_call_id" is not text'),
    ({"role": "tool", "content": None}, "not text but null"),
    ({"role": "tool", "content": {"a": 1}}, "not text but of type dict"),
]


@pytest.mark.parametrize("change, reason", BAD)
def test_a_bad_call_is_named(change, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = {"messages": SHAPES["a call"], "tools": TOOLS}
    bad = {"messages": [USER, {"role": "assistant", "content": "", **change}]}
    bad["messages"].append(says("x"))
    with pytest.raises(DataError) as caught:
        read_conversations([write(good, bad)], TOKENIZER, 2000)
    said = str(caught.value)
    assert said.startswith("chat.jsonl, line 2: message 2: ") and reason in said
    assert "\n" not in said and len(said) < 400


SPELLED = 'Hm.\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


def test_a_call_spelled_in_a_content_is_refused(tmp_path, monkeypatch):
    """Its marks would be learned as letters; where they are no tokens, they are."""
    monkeypatch.chdir(tmp_path)
    asked = {"role": "user", "content": SPELLED}
    about = says("A call begins with <tool_call>, and ends.")
    good = {"messages": [asked, about]}
    bad = {"messages": [asked, says(SPELLED), asked, says("ok")]}
    path = write(good, bad)
    with pytest.raises(DataError) as caught:
        read_conversations([path], TOKENIZER, 2000)
    said = str(caught.value)
    assert said.startswith("chat.jsonl, line 2: message 2: its content spells <tool_c")
    assert 'put calls into "tool_calls"' in said and "\n" not in said
    assert len(read_conversations([path], TOKENIZER, 2000, True)[0]) == 1
    letters = load("smollm2")[1]
    assert len(read_conversations([path], letters, 2000)[0]) == 2
    pair = {"prompt": SPELLED, "chosen": "ok", "rejected": "no"}
    assert read_pair(line(pair), TOKENIZER, 2000)
    for name in ("chosen", "rejected"):
        with pytest.raises(ValueError, match=f'^"{name}": its content spells'):
            read_pair(line({**pair, name: SPELLED}), TOKENIZER, 2000)
    assert read_pair(line({**pair, "chosen": SPELLED}), letters, 2000)


@pytest.mark.parametrize("tools", [3, "x", "[1]", [3], {"a": 1}, "[" * 99_999])
def test_tools_that_are_none_are_named(tools, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = write({"messages": SHAPES["no call"], "tools": tools})
    with pytest.raises(DataError, match='line 1: "tools" is no list of'):
        read_conversations([bad], TOKENIZER, 2000)


@pytest.mark.parametrize("name", ["a call", "no call", "a tool first"])
def test_a_template_without_tools_refuses_the_line(
    name, tokenizer_files, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tokenizer = with_template(tokenizer_files, UNMARKED)
    good = {"prompt": "x", "completion": "y"}
    path = write(good, {"messages": SHAPES[name], "tools": TOOLS})
    with pytest.raises(DataError) as caught:
        read_conversations([path], tokenizer, 2000)
    said = str(caught.value)
    assert said.startswith("chat.jsonl, line 2: tools: the chat template of this model")
    assert "use a model whose template does" in said and "\n" not in said
    assert len(read_conversations([path], tokenizer, 2000, True)[0]) == 1


def test_a_run_learns_to_call(folder):  # noqa: F811
    model = small(max_position_embeddings=1000)
    save_checkpoint("base", model, TOKENIZER)
    shapes = [s for s in SHAPES.values() for _ in range(3)]
    write(*({"messages": s, "tools": TOOLS} for s in shapes))
    train(chat_settings(sequence_length=1000), init_from="base")
    lines = Path("checkpoints/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6


# --- pairs and questions


def line(record):
    return Line("pairs.jsonl", 1, json.dumps(record).encode())


def test_pairs_may_have_tools():
    asked = [USER, says(None, OSLO), told("rain")]
    whole = read_messages({"messages": [*asked, says("It rains.")]})
    record = {"prompt": asked, "chosen": "It rains.", "rejected": "It does."}
    prompt, chosen, rejected = read_pair(
        line({**record, "tools": TOOLS}), TOKENIZER, 2000
    ).ids
    ids, _ = answer_spans(TOKENIZER, whole, answer_end(TOKENIZER), TOOLS)
    assert prompt + chosen == ids and rejected != chosen
    better, worse = [says("", OSLO)], [says("", NOW)]
    pair = read_pair(
        line({"prompt": "x", "chosen": better, "rejected": worse}), TOKENIZER, 2000
    )
    assert TOKENIZER.decode(pair.ids[1]).startswith('<tool_call>\n{"name": "weather"')
    both = {"chosen": [*asked, says("a")], "rejected": [*asked, says("b")]}
    taken = read_pair(line({**both, "tools": TOOLS}), TOKENIZER, 2000)
    assert taken.ids[0] == prompt
    inside = {"prompt": "x", "chosen": [*asked[1:], says("a")], "rejected": "b"}
    with pytest.raises(ValueError, match='"chosen" holds what a tool says'):
        read_pair(line(inside), TOKENIZER, 2000)
    wrong = {"prompt": [{**USER, "tool_calls": [NOW]}], "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match="of another role than the assistant"):
        read_pair(line(wrong), TOKENIZER, 2000)


def test_questions_may_have_tools():
    asked = [USER, says(None, OSLO), told("rain")]
    config = chat_settings(sequence_length=1000, max_new_tokens=4)
    record = {"prompt": asked, "answer": "rain", "tools": TOOLS}
    found = read_question(line(record), TOKENIZER, config)
    spans = answer_spans(
        TOKENIZER,
        read_messages({"messages": [*asked, says("x")]}),
        answer_end(TOKENIZER),
        TOOLS,
    )
    assert found.prompt == spans[0][: spans[1][1].start]
    with pytest.raises(ValueError, match='"tools" is no list'):
        read_question(line({**record, "tools": [1]}), TOKENIZER, config)
