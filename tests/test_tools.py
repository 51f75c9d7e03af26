"""Tools: told as Qwen2.5's template tells them, found in any pieces, forced where a
client wants it, and passed on in OpenAI's form.
"""

import json
import unicodedata
from pathlib import Path

import jsonschema
import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_helpers import (
    CONFIG,
    EOS,
    MODEL,
    NAME,
    TOKENIZER,
    USER,
    Scripted,
    client,
    end_servers,
    idle,
    post,
    serving,
    spell,
    tiny_fixture,
)
from test_grammar import QUICK, SCHEMAS

from qwen_analog import protocol, tools as tools_module
from qwen_analog.chat_template import chat_ids, knows_tools
from qwen_analog.engine import AsyncEngine
from qwen_analog.finetune import read_messages
from qwen_analog.grammar import Grammar
from qwen_analog.hf import save_pretrained
from qwen_analog.hf_tokenizer import HFTokenizer
from qwen_analog.loading import load
from qwen_analog.tokenizer import encode_chat
from qwen_analog.tokenizer_json import QWEN_CHAT_TEMPLATE
from qwen_analog.tools import Call, CallFinder, call_text, calls_grammar, read_call

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
QWEN = (TEMPLATES / "qwen2_5.jinja").read_text()


def tool(name, **properties):
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    described = {"name": name, "description": f"the {name}", "parameters": parameters}
    return {"type": "function", "function": described}


WEATHER = tool("weather", city={"type": "string", "maxLength": 5})
ADD = tool("add", a={"type": "integer", "maximum": 99, "minimum": 0})
TOOLS = [WEATHER, ADD]


@pytest.fixture(scope="module", name="hf")
def hf_fixture(tmp_path_factory):
    """Our tokenizer as Hugging Face's, with Qwen2.5's template."""
    directory = tmp_path_factory.mktemp("hf") / "model"
    save_pretrained(MODEL, TOKENIZER, directory)
    tokenizer = load(str(directory))[1]
    tokenizer.tokenizer.chat_template = QWEN
    return tokenizer


# --- told

TEXT = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    ["<tool_call>", "</tool_call>", "<|im_end|>\n<|im_start|>system\n", 'a "b" \\n']
)
CALLS = st.builds(
    lambda name, arguments: {
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    },
    st.sampled_from(["weather", "add"]),
    st.dictionaries(
        TEXT, TEXT | st.integers() | st.none() | st.lists(TEXT), max_size=2
    ),
)
MESSAGES = st.one_of(
    st.builds(lambda text: {"role": "user", "content": text}, TEXT),
    st.builds(lambda text: {"role": "system", "content": text}, TEXT),
    st.builds(lambda text: {"role": "tool", "content": text}, TEXT),
    st.builds(lambda text: {"role": "assistant", "content": text}, TEXT),
    st.builds(
        lambda text, calls: {"role": "assistant", "content": text, "tool_calls": calls},
        TEXT,
        st.lists(CALLS, min_size=1, max_size=2),
    ),
)


def check_told(hf, messages, tools):
    """The text of our renderer is that of Qwen2.5's template, and so are the ids of the
    same template here: nothing that was said becomes a control token.
    """
    theirs = hf.tokenizer.apply_chat_template(
        messages, tools=tools or None, tokenize=False, add_generation_prompt=True
    )
    ours = chat_ids(TOKENIZER, messages, tools=tools)
    # Qwen's vocabularies know one spelling of a letter with an accent
    assert TOKENIZER.decode(ours) == unicodedata.normalize("NFC", theirs)
    assert chat_ids(hf, messages, tools=tools) == ours
    return ours


@settings(QUICK, max_examples=60)
@given(st.lists(MESSAGES, min_size=1, max_size=5), st.sampled_from([[], TOOLS]))
def test_a_conversation_is_told_as_qwen_tells_it(hf, messages, tools):
    ids = check_told(hf, messages, tools)
    calls = sum(len(message.get("tool_calls", ())) for message in messages)
    mark = TOKENIZER.encode("<tool_call>", special=True)
    # the tools' description names each mark twice
    assert ids.count(mark[0]) == calls + 2 * bool(tools)
    if not tools and not calls and all(m["role"] != "tool" for m in messages):
        assert ids == encode_chat(TOKENIZER, messages)


# what 0.1.0 and early 0.2.0 wrote into directories
OLD = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role"
    " }}\n{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt"
    " %}<|im_start|>assistant\n{% endif %}"
)


@settings(QUICK, max_examples=60)
@given(
    st.lists(MESSAGES, min_size=1, max_size=5),
    st.sampled_from([None, [], TOOLS]),
    st.booleans(),
)
def test_what_is_exported_writes_what_qwens_own_template_writes(
    hf, messages, tools, ask
):
    def told(template, messages, tools=None):
        return hf.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=ask,
        )

    assert told(QWEN_CHAT_TEMPLATE, messages, tools) == told(QWEN, messages, tools)
    flat = [
        {**m, "tool_calls": [call["function"] for call in m.get("tool_calls", ())]}
        for m in messages
    ]
    assert told(QWEN_CHAT_TEMPLATE, flat, tools) == told(QWEN, flat, tools)
    plain = [m for m in messages if m["role"] != "tool" and "tool_calls" not in m]
    plain += [{"role": "developer", "content": "x"}]
    assert told(QWEN_CHAT_TEMPLATE, plain) == told(OLD, plain)


def test_a_model_of_this_package_is_exported_with_tools(tmp_path):
    """And one that was exported before opens as it did, and knows none."""
    save_pretrained(MODEL, TOKENIZER, tmp_path / "new")
    tokenizer = load(str(tmp_path / "new"))[1]
    assert tokenizer.tokenizer.chat_template == QWEN_CHAT_TEMPLATE
    assert knows_tools(tokenizer)
    for tools, messages in ([], ROUND[1:]), (TOOLS, ROUND):
        told = chat_ids(tokenizer, messages, tools=tools)
        assert told == chat_ids(TOKENIZER, messages, tools=tools)
    place = tmp_path / "new" / "tokenizer_config.json"
    written = json.loads(place.read_text())
    place.write_text(json.dumps({**written, "chat_template": OLD}))
    before = load(str(tmp_path / "new"))[1]
    assert before.tokenizer.chat_template == OLD and not knows_tools(before)
    assert chat_ids(before, USER) == chat_ids(tokenizer, USER)


def results_in_turns_of_their_own(messages, tools=()):
    found = []
    for message in messages:
        if message["role"] == "tool":
            found += PLAIN([message])
        else:
            found.append(message)
    return PLAIN(found, tools)


def tools_in_another_order(messages, tools=()):
    return PLAIN(messages, [dict(reversed(tool.items())) for tool in tools])


def without_the_first_system_message(messages, tools=()):
    plain = PLAIN(messages, tools)
    return plain[1:] if plain[1:] and plain[0]["role"] == "system" else plain


PLAIN = tools_module.plain_messages
ROUND = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "and?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
            {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}},
        ],
    },
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": "2"},
]


def test_a_round(hf):
    check_told(hf, ROUND, TOOLS)
    check_told(hf, ROUND[1:], [])


@pytest.mark.mutant
@pytest.mark.parametrize(
    "mutant",
    [
        results_in_turns_of_their_own,
        tools_in_another_order,
        without_the_first_system_message,
    ],
)
def test_told_kills(mutant, hf, monkeypatch):
    monkeypatch.setattr("qwen_analog.chat_template.plain_messages", mutant)
    with pytest.raises(AssertionError):
        check_told(hf, ROUND, TOOLS)


def test_which_templates_know_tools(hf):
    known = {"qwen2_5", "qwen3", "qwen3_instruct_2507"}
    names = [*known, "llama3_1", "smolvlm", "phi3", "gemma", "deepseekv3"]
    own = hf.tokenizer.chat_template
    found = set()
    for name in names:
        hf.tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        if knows_tools(hf):
            found.add(name)
        if knows_tools(hf, any_form=True):
            calls = ROUND[2]["tool_calls"][: 1 if name == "llama3_1" else 2]
            said = [*ROUND[:2], {**ROUND[2], "tool_calls": calls}, *ROUND[3:]]
            theirs = hf.tokenizer.apply_chat_template(
                said, tools=TOOLS, tokenize=False, add_generation_prompt=True
            )
            assert hf.decode(chat_ids(hf, said, tools=TOOLS)) == theirs
        else:
            for messages, tools in ((ROUND, []), (USER, TOOLS)):
                with pytest.raises(ValueError, match="^tools: the chat template"):
                    chat_ids(hf, messages, tools=tools)
    hf.tokenizer.chat_template = own
    assert found == known and knows_tools(TOKENIZER)


# --- found

WORDS = ["add", "weather"]
PARTS = st.lists(
    st.sampled_from(
        [
            call_text("add", {"a": 1}),
            call_text("weather", {"city": "\u00e9", "<tool_call>": [None]}),
            call_text("nobody", {}),
            "<tool_call>",
            "</tool_call>",
            "<tool",
            "<",
            " ",
            "\n",
            "words",
            '<tool_call>{"name": "add"}</tool_call>',
            '<tool_call>[1, "a"]</tool_call>',
        ]
    ),
    max_size=8,
).map("".join)


def found_in(text, cuts):
    finder = CallFinder(WORDS)
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    parts = []
    for start, end in zip(bounds, bounds[1:]):
        parts += finder.push(text[start:end])
    parts += finder.finish()
    joined = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part:
            joined.append(part)
    assert finder.found == sum(isinstance(part, Call) for part in joined)
    return joined


@settings(QUICK, max_examples=300)
@given(PARTS, st.lists(st.integers(0, 400), max_size=12))
def test_pieces_do_not_matter(text, cuts):
    whole = found_in(text, [])
    assert found_in(text, cuts) == whole == found_in(text, range(len(text)))
    # nothing is lost but blanks around calls
    told = [
        p if isinstance(p, str) else call_text(p[0], json.loads(p[1])) for p in whole
    ]
    assert "".join("".join(told).split()) == "".join(text.split())


def test_what_is_shown_is_shown_at_once():
    finder = CallFinder(WORDS)
    seen = [finder.push(piece) for piece in ("a", " b<", "c", "\n<tool_c", "x", " ")]
    assert seen == [["a"], [" b"], ["<c"], [], ["\n<tool_cx"], []]
    assert finder.finish() == [" "]


WRONG_CALLS = [
    "",
    "{",
    "[]",
    '{"name": "add"}',
    '{"name": "add", "arguments": []}',
    '{"name": "add", "arguments": "{}"}',
    '{"name": ["add"], "arguments": {}}',
    '{"name": "other", "arguments": {}}',
    '{"name": "add", "arguments": {"a": NaN}}',
    '{"name": "add", "arguments": {"a": 1e999}}',
    '{"name": "add", "arguments": {"a": %s}}' % ("1" * 5000),
    '{"name": "add", "arguments": {"a": %s}}' % ("[" * 100_000),
    '{"name": "add", "arguments": {}} {}',
    '{"name": "add", "arguments": {}, "more": 1}',
]


@pytest.mark.parametrize("text", WRONG_CALLS)
def test_what_is_no_call_stays_text(text):
    assert read_call(text, WORDS) is None
    written = f"a <tool_call>{text}</tool_call> b"
    assert found_in(written, [3, 9]) == [written]


def test_calls_in_any_layout():
    assert read_call(' {"arguments":{},\n"name":"add"}', WORDS) == Call("add", "{}")
    odd = read_call('{"name": "add", "arguments": {"a": "\\ud800 \u00e9"}}', WORDS)
    assert odd.arguments.encode() and json.loads(odd.arguments) == {
        "a": "\ud800 \u00e9"
    }
    finder = CallFinder(WORDS)
    finder.push('<tool_call>{"name": "add", "arguments": {}}')
    assert finder.finish(closed=True) == [Call("add", "{}")]


# --- forced


@settings(QUICK, max_examples=8)
@given(SCHEMAS, SCHEMAS)
def test_every_forced_call_is_valid(first, second):
    """The model has random weights; the arguments have their schema."""
    asked = [tool("one", x=first), tool("two", y=second)]
    engine = AsyncEngine(MODEL, TOKENIZER, max_batch=2, max_context=2000)
    body = {"model": NAME, "messages": USER, "tools": asked, "max_tokens": 200}
    body |= {"tool_choice": "required", "n": 2, "seed": 1, "temperature": 1}
    body["parallel_tool_calls"] = False
    body = protocol.parse_body(json.dumps(body).encode(), True)
    requests = protocol.make_requests(engine, body)
    deltas = []
    engine.add_request(*requests, deliver=deltas.append)
    while engine.step():
        pass
    choices = protocol.ChoiceWriter(body, requests, lambda token: b"", engine.stop_ids)
    whole = protocol.ReplyWriter(NAME, body, choices).whole(deltas)
    for choice in whole["choices"]:
        if choice["finish_reason"] == "length":
            continue
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        schemas = {t["function"]["name"]: t["function"]["parameters"] for t in asked}
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, schemas[call["function"]["name"]])


def test_the_grammar_of_calls():
    functions = [t["function"] for t in TOOLS]
    one, two = call_text("add", {"a": 5}), call_text("weather", {"city": "x"})
    told = {True: [one, two, one + "\n" + two], False: [one, two]}
    answer = {"type": "object", "additionalProperties": False}
    for several, texts in told.items():
        for otherwise in (None, answer):
            rules = calls_grammar(TOKENIZER, functions, several, otherwise)
            grammar = Grammar(TOKENIZER, rules)
            right = [*texts, "{}"] if otherwise else texts
            for text in [one, two, one + "\n" + two, "{}", call_text("add", {}), "x"]:
                whole = may_be_written(grammar, TOKENIZER, text)
                assert whole == (text in right), (text, several, otherwise)


def may_be_written(grammar, tokenizer, text, **spelled):
    ids = tokenizer.encode(text, **(spelled or {"special": True}))
    state, end = grammar.start([tokenizer.eos_token_id]), tokenizer.eos_token_id
    for i, token in enumerate(ids):
        if not state.allowed(ids[:i])[token]:
            return False
    return bool(state.allowed(ids)[end])


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("marks", ["tokens", "text"])
def test_the_grammar_of_free_answers(several, marks):
    """Any text, and calls that have their schema; the marks may be no tokens."""
    tokenizer = TOKENIZER if marks == "tokens" else load("smollm2")[1]
    functions = [t["function"] for t in TOOLS]
    rules = calls_grammar(tokenizer, functions, several, free=True)
    grammar = Grammar(tokenizer, rules)
    one, two = call_text("add", {"a": 5}), call_text("weather", {"city": "x"})
    empty, text_for_number = call_text("add", {}), call_text("add", {"a": "5"})
    right = ["", "\u00e9, a < b\n{}", "so <tool_call", one, f"Wait.\n{two}\n"]
    both = [f"{one}\n{two}", f"x {one}\n{two}"]
    wrong = [empty, f"Wait. {text_for_number}", "<tool_call>", f"{one} b"]
    for text in right + both + wrong:
        allowed = text in right or several and text in both
        assert may_be_written(grammar, tokenizer, text) == allowed, text
    if marks == "tokens":  # spelled with letters, a mark would be read as one
        assert not may_be_written(grammar, tokenizer, one, special=False)


# --- over HTTP, with OpenAI's own client


def writing(text, tools=TOOLS, **options):
    """A server whose model writes this answer to `ask`'s prompt."""
    prompt = chat_ids(TOKENIZER, USER, tools=tools)
    script = [0] * len(prompt) + TOKENIZER.encode(text, special=True) + [EOS]
    engine = AsyncEngine(Scripted(script), TOKENIZER, max_context=2000, **options)
    return serving(engine)


def joined(chunks):
    """The message that chunks of one streamed answer make, and why it ends."""
    content, calls, reason = "", [], None
    for chunk in chunks:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            assert call.index == len(calls) and call.type == "function"
            calls.append((call.id, call.function.name, call.function.arguments))
        assert reason is None
        reason = choice.finish_reason
    return content, calls, reason


ADD_1, IN_X = call_text("add", {"a": 1}), call_text("weather", {"city": "x"})
ANSWERS = [
    (ADD_1, None, [("add", {"a": 1})], "tool_calls"),
    (f"Wait.\n{ADD_1}", "Wait.", [("add", {"a": 1})], "tool_calls"),
    (
        f"{ADD_1}\n{IN_X}\n",
        None,
        [("add", {"a": 1}), ("weather", {"city": "x"})],
        "tool_calls",
    ),
    ("no calls", "no calls", [], "stop"),
    (f"{ADD_1} b", "b", [("add", {"a": 1})], "tool_calls"),
    ("<tool_call>\nadd(1)\n</tool_call>", None, [], "stop"),
    (call_text("other", {}), None, [], "stop"),
    ("<tool_call>\n{", None, [], "stop"),
]


@pytest.mark.parametrize(
    "text, content, calls, reason", ANSWERS, ids=range(len(ANSWERS))
)
def test_calls_are_passed_on(text, content, calls, reason):
    content = text if content is None and not calls else content
    with writing(text) as port:
        ask = client(port).chat.completions.create
        options = dict(model=NAME, messages=USER, tools=TOOLS, max_tokens=400)
        choice = ask(**options).choices[0]
        streamed = joined(ask(stream=True, **options))
        off = ask(**{**options, "tool_choice": "none"}).choices[0]
    found = choice.message.tool_calls or []
    assert [(c.function.name, json.loads(c.function.arguments)) for c in found] == calls
    assert choice.message.content == content and choice.finish_reason == reason
    assert len({call.id for call in found}) == len(found)
    assert streamed[0] == (content or "") and streamed[2] == reason
    assert [(name, json.loads(text)) for _, name, text in streamed[1]] == calls
    assert off.message.tool_calls is None


def test_one_call_only():
    with writing(f"{ADD_1}\n{IN_X}") as port:
        ask = client(port).chat.completions.create
        options = dict(model=NAME, messages=USER, tools=TOOLS, max_tokens=400)
        one = ask(parallel_tool_calls=False, **options).choices[0]
        cut = ask(**{**options, "max_tokens": 50}).choices[0]
    assert [call.function.name for call in one.message.tool_calls] == ["add"]
    assert one.finish_reason == "tool_calls"
    # a call that max_tokens cut off is none
    assert cut.finish_reason == "length" and len(cut.message.tool_calls) == 1


STRICT = [{**t, "function": {**t["function"], "strict": True}} for t in TOOLS]


@pytest.mark.parametrize("text, content, calls, reason", ANSWERS[:4], ids=range(4))
def test_strict_tools_leave_good_answers_alone(text, content, calls, reason):
    with writing(text, tools=STRICT) as port:
        ask = client(port).chat.completions.create
        options = dict(model=NAME, messages=USER, tools=STRICT, max_tokens=400)
        choice = ask(**options).choices[0]
    found = choice.message.tool_calls or []
    assert [(c.function.name, json.loads(c.function.arguments)) for c in found] == calls
    assert choice.message.content == content and choice.finish_reason == reason


@pytest.mark.parametrize("text", [call_text("add", {"a": "x"}), call_text("other", {})])
def test_strict_tools_are_called_by_their_schema(text):
    """The model wants to write a call that is none; only a good one can come of it."""
    for tools in (TOOLS, STRICT):
        with writing(f"Well.\n{text}", tools=tools) as port:
            ask = client(port).chat.completions.create
            options = dict(model=NAME, messages=USER, tools=tools, max_tokens=90)
            message = ask(**options).choices[0].message
        schemas = {t["function"]["name"]: t["function"]["parameters"] for t in tools}
        good = "</tool_call>" not in message.content
        for call in message.tool_calls or []:
            schema = schemas[call.function.name]
            good = good and is_valid(json.loads(call.function.arguments), schema)
        assert message.content.startswith("Well.") and good == (tools is STRICT)


def is_valid(value, schema):
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def test_required_and_named():
    big = AsyncEngine(MODEL, TOKENIZER, max_batch=3, max_context=2000)
    with serving(big) as port:
        ask = client(port).chat.completions.create
        options = dict(model=NAME, messages=USER, tools=TOOLS, temperature=1)
        options |= dict(max_tokens=200, parallel_tool_calls=False)
        named = {"type": "function", "function": {"name": "weather"}}
        names = set()
        for seed in range(4):
            choice = "required" if seed % 2 else named
            reply = ask(tool_choice=choice, seed=seed, **options).choices[0]
            streamed = joined(
                ask(tool_choice=choice, seed=seed, stream=True, **options)
            )
            (call,) = reply.message.tool_calls
            assert reply.finish_reason == streamed[2] == "tool_calls"
            found = call.function.name, call.function.arguments
            assert streamed[1][0][1:] == found and not streamed[0]
            names.add((choice == named, call.function.name))
            schema = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
            jsonschema.validate(json.loads(found[1]), schema[found[0]])
        assert (True, "add") not in names and (False, "add") in names
        # the whole way round: the answer and its result go back into the conversation
        result = {"role": "tool", "tool_call_id": call.id, "content": "7"}
        again = ask(
            **{**options, "messages": [*USER, reply.message, result]}, logprobs=True
        )
        expected = [*USER, {"role": "assistant", "content": ""}, {**result}]
        wanted = {"name": found[0], "arguments": json.loads(found[1])}
        expected[1]["tool_calls"] = [{"type": "function", "function": wanted}]
        ids = chat_ids(TOKENIZER, expected, tools=TOOLS)
        assert again.usage.prompt_tokens == len(ids)
        either = ask(
            response_format={"type": "json_object"}, tool_choice="auto", **options
        ).choices[0]
        assert either.message.tool_calls or either.message.content.startswith("{")
        stream = ask(tool_choice="required", stream=True, **options)
        next(stream)
        stream.close()
        idle(big)


def of_type(kind):
    function = {"name": "f", "parameters": {"type": kind, "maxProperties": 0}}
    return {"type": "function", "function": function}


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("kind", [["object", "null"], ["string", "object"], ["object"]])
def test_arguments_are_an_object_where_a_schema_leaves_a_choice(kind, free):
    rules = calls_grammar(TOKENIZER, [of_type(kind)["function"]], free=free)
    grammar = Grammar(TOKENIZER, rules)
    assert may_be_written(grammar, TOKENIZER, call_text("f", {}))
    for other in (None, "a", [], 1):
        assert not may_be_written(grammar, TOKENIZER, call_text("f", other)), other


@pytest.mark.parametrize("kind", ["array", "string", ["null", "string"], [], 3, None])
@pytest.mark.parametrize("forced", [True, False])
def test_parameters_that_are_no_object_are_refused_by_name(kind, forced, tiny):
    tools = [ADD, of_type(kind)]
    body = bad(tools=tools, tool_choice="required")
    if not forced:
        tools[1]["function"]["strict"] = True
        body = bad(tools=tools)
    status, content, _ = post(tiny[0], body, "/v1/chat/completions")
    error = content["error"]
    assert status == 400 and error["param"] == "tools"
    assert error["message"] == (
        f"tools: the parameters of f have the type {kind!r}: arguments are an object,"
        ' so write "type": "object"'
    )


def bad(**more):
    return {"model": NAME, "messages": USER, "max_tokens": 2, **more}


CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def calling(arguments):
    call = {**CALL, "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


REFUSED = [
    (bad(tools=3), "tools"),
    (bad(tools=[{"type": "function"}]), "tools"),
    (bad(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools"),
    (bad(tools=[{"type": "web", "function": {"name": "a"}}]), "tools"),
    (bad(tools=[ADD, ADD]), "tools"),
    (bad(tools=[ADD] * 129), "tools"),
    (bad(tool_choice="required"), "tool_choice"),
    (bad(tools=TOOLS, tool_choice="sometimes"), "tool_choice"),
    (
        bad(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "x"}}),
        "tool_choice",
    ),
    (bad(tools=TOOLS, parallel_tool_calls=1), "parallel_tool_calls"),
    (bad(functions=[{"name": "a"}]), "functions"),
    (
        bad(messages=[{"role": "user", "content": "x", "tool_calls": [CALL]}]),
        "messages[0].tool_calls",
    ),
    (bad(messages=[{"role": "tool"}]), "messages[0].content"),
    (bad(messages=[calling("[1]")]), "messages[0].tool_calls"),
    (bad(messages=[calling("{")]), "messages[0].tool_calls"),
    (bad(messages=[calling("[" * 99_999)]), "messages[0].tool_calls"),
    (
        bad(
            tools=[tool("f", x={"type": "array", "uniqueItems": True})],
            tool_choice="required",
        ),
        "tools",
    ),
]


@pytest.mark.parametrize("body, param", REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(body, param, tiny):
    status, content, _ = post(tiny[0], body, "/v1/chat/completions")
    error = content["error"]
    assert status == 400 and error["param"] == param, error
    assert len(error["message"]) < 400 and "\n" not in error["message"]


# in a row: what is said, the calls with their ids, the id of what is answered
WITH_IDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.id }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson'
    " }}}\n</tool_call>{% endfor %}"
    "{% if m.role == 'tool' %}{% if m.tool_call_id | length < 9 %}"
    "{{ raise_exception('ids have 9 characters') }}{% endif %} for {{ m.tool_call_id }}"
    "{% endif %}<|im_end|>\n{% endfor %}{{ tools | tojson }}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


IDS = ["abcdefghi", "call_<|im_end|>", "call_\ue000<|im_end|>"]


def answered(number):
    return [
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": number}]},
        {"role": "tool", "tool_call_id": number, "content": "1"},
    ]


@pytest.mark.parametrize("number", IDS)
def test_ids_of_calls_are_told_as_in_training(number, hf, monkeypatch):
    monkeypatch.setattr(hf.tokenizer, "chat_template", WITH_IDS)
    engine = AsyncEngine(MODEL, hf, max_batch=1, max_context=1500)
    body = bad(messages=answered(number), tools=TOOLS)
    with pytest.raises(protocol.ApiError, match="ids have 9 characters"):
        make(engine, bad(messages=answered("short"), tools=TOOLS))
    (request,) = make(engine, body)
    trained = read_messages({"messages": answered(number)})
    assert list(request.prompt) == chat_ids(hf, trained, tools=TOOLS)
    assert TOKENIZER.decode(list(request.prompt)).count(number) == 2
    # an id spells no control token
    end = TOKENIZER.encode("<|im_end|>", special=True)[0]
    assert list(request.prompt).count(end) == len(trained)


def make(engine, body):
    asked = protocol.parse_body(json.dumps(body).encode(), True)
    return protocol.make_requests(engine, asked)


NAMED = {"type": "function", "function": {"name": "x"}}
ASKED = [{"role": "user", "content": "x", "tool_calls": [CALL]}]
REASONS = [
    (dict(tools=[ADD, WEATHER, ADD]), "tools: 2 tools have the name add: give each"),
    (dict(tools=TOOLS, tool_choice=NAMED), "tool_choice: there is no tool 'x': name"),
    (dict(tool_choice=NAMED), "tool_choice: there is no tool 'x': name one of the"),
    (dict(tool_choice="required"), 'tool_choice: "required" needs tools'),
    (dict(messages=ASKED), "messages[0].tool_calls: only the assistant calls"),
    (
        dict(messages=[calling("[1]")]),
        "messages[0].tool_calls: the arguments of a call of 'add': no JSON object",
    ),
    (
        dict(messages=[{"role": "user"}]),
        "messages[0].content: a message without a content: write a text",
    ),
    (dict(stop=["a"] * 17), "stop must be at most 16 texts"),
    (dict(tools=[{"type": "function"}]), "tools must be a list of at most 128"),
]


@pytest.mark.parametrize("more, reason", REASONS, ids=range(len(REASONS)))
def test_a_refusal_says_why(more, reason):
    with pytest.raises(protocol.ApiError) as caught:
        protocol.parse_body(json.dumps(bad(**more)).encode(), True)
    said = str(caught.value)
    assert said.startswith(reason) and "\n" not in said


def test_a_template_without_tools_refuses_by_name(hf):
    own, plain = hf.tokenizer.chat_template, "{{ messages[0].content }}"
    hf.tokenizer.chat_template = plain
    engine = AsyncEngine(MODEL, hf, max_batch=1, max_context=300)
    with serving(engine) as port:
        found = post(port, bad(tools=TOOLS), "/v1/chat/completions")
        quiet = post(port, bad(tools=TOOLS, tool_choice="none"), "/v1/chat/completions")
        told = post(
            port,
            bad(messages=[*USER, {"role": "tool", "content": "x"}]),
            "/v1/chat/completions",
        )
    hf.tokenizer.chat_template = own
    assert found[0] == 400 and found[1]["error"]["param"] == "tools"
    assert "knows none" in found[1]["error"]["message"] and quiet[0] == 200
    assert told[0] == 400 and told[1]["error"]["param"] == "messages"


def test_deep_tools_are_refused(tiny):
    deep = {"type": "array"}
    for _ in range(400):
        deep = {"type": "array", "items": deep}
    for choice in ("auto", "required"):
        body = bad(tools=[tool("f", x=deep)], tool_choice=choice)
        status, content, _ = post(tiny[0], body, "/v1/chat/completions")
        assert status == 400, content
