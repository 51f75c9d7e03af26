"""Grammars: every answer has the form that was asked for, whoever shares the batch,
whenever it is interrupted, and however the model would rather write.
"""

import concurrent.futures
import io
import json
import sys

import jsonschema
import openai
import pytest
import sentencepiece
import torch
from helpers import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_helpers import (  # noqa: F811
    CONFIG,
    EOS,
    MODEL,
    NAME,
    TOKENIZER,
    USER,
    alone,
    answers,
    client,
    end_servers,
    idle,
    log_fixture,
    new_request,
    post,
    serving,
    text_of,
    tiny_fixture,
    together,
)

from qwen_analog import QwenForCausalLM, engine as engine_module
from qwen_analog.engine import AsyncEngine, Engine, ModelRunner
from qwen_analog.generate import generate
from qwen_analog.grammar import (
    MAX_SCHEMA,
    Grammar,
    GrammarError,
    GrammarState,
    json_grammar,
    token_bytes,
)
from qwen_analog.loading import load
from qwen_analog.hf import save_pretrained
from qwen_analog.sampling import SamplingParams
from qwen_analog.scheduler import Request
from qwen_analog.text_stream import complete, complete_many, stream
from qwen_analog.tokenizer import (
    SentencePieceTokenizer,
    TiktokenTokenizer,
    control_tokens,
)

QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 99},
        "name": {"type": "string", "maxLength": 4},
    },
    "required": ["x", "name"],
    "additionalProperties": False,
}
GRAMMAR = json_grammar(TOKENIZER, POINT)


def formed(prompt, max_tokens=60, grammar=GRAMMAR, **params):
    params = SamplingParams(**params)
    return Request(prompt, max_tokens, params, logprobs=0, grammar=grammar)


# --- schemas of every kind, and a model that knows nothing of them

LEAVES = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)},
        st.integers(-1000, 1000),
        st.integers(-1000, 1000),
    ),
    st.integers(0, 6).map(lambda n: {"type": "string", "maxLength": n}),
    st.just({"type": "string", "pattern": "^[a-c]{2}-[0-9]$"}),
    st.lists(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        min_size=1,
        max_size=3,
        unique_by=repr,
    ).map(lambda values: {"enum": values}),
    st.text(max_size=4).map(lambda text: {"const": text}),
)


def bigger(inner):
    names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)
    return st.one_of(
        st.builds(
            lambda items, most: {
                "type": "array",
                "items": items,
                "minItems": most // 2,
                "maxItems": most,
            },
            inner,
            st.integers(0, 3),
        ),
        st.builds(
            lambda properties, left_out: {
                "type": "object",
                "properties": properties,
                "required": list(properties)[left_out:],
                "additionalProperties": False,
            },
            st.dictionaries(names, inner, max_size=3),
            st.integers(0, 2),
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some}),
    )


SCHEMAS = st.recursive(LEAVES, bigger, max_leaves=5)


@QUICK
@given(SCHEMAS, st.integers(0, 2), st.sampled_from([0, 0.7, 1.5]))
def test_every_answer_parses_and_is_valid(schema, seed, temperature):
    engine = Engine(MODEL, TOKENIZER, max_batch=2, max_context=400)
    request = formed(
        [1 + seed],
        300,
        json_grammar(TOKENIZER, schema),
        seed=seed,
        temperature=temperature,
        top_p=0.9,
    )
    (found,) = answers(engine, request)
    text, reason = text_of(found)
    if reason == "length":  # a greedy model may say the same for ever
        assert len(text) > 100
    else:
        assert reason == "stop", text
        jsonschema.validate(json.loads(text), schema)


def check_forms(every=2, **options):
    """Rows with a grammar and rows without, each as alone: tokens and form."""
    wanted = []
    for i in range(10):
        grammar = GRAMMAR if i % 3 else None
        size = 12 if grammar is None or i == 4 else 60
        settings = [
            dict(temperature=0),
            dict(temperature=1.0, top_p=0.8),
            dict(temperature=1.5, top_k=3, repetition_penalty=1.3),
        ]
        wanted.append(
            formed([5 + i] * (1 + i), size, grammar, seed=i, **settings[i % 3])
        )
    engine = Engine(MODEL, TOKENIZER, max_context=80, **options)
    expected = [alone(request) for request in wanted]
    found = together(engine, wanted, every)
    assert found == expected
    ends = {EOS, EOS + 2}
    for request, tokens in zip(wanted, found):
        if request.grammar is None:
            continue
        assert (tokens[-1] in ends) == (len(tokens) < request.max_tokens)
        text = TOKENIZER.decode([token for token in tokens if token not in ends])
        if tokens[-1] in ends:
            jsonschema.validate(json.loads(text), POINT)
        else:
            assert text.startswith("{")
    return found


def alone(request):  # noqa: F811
    """Token ids that `generate` writes for the request, grammar included."""
    params = request.params
    ids = torch.tensor([request.prompt])
    written = generate(
        MODEL,
        ids,
        request.max_tokens,
        eos_token_id=[EOS, EOS + 2],
        valid_vocab_size=TOKENIZER.vocab_size,
        grammar=request.grammar,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
    )
    return written[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        dict(max_batch=4),
        dict(max_batch=1, prefill_chunk=3),
        # too few pages for three answers: some are interrupted, and read again
        dict(max_batch=4, kv_pages=22, page_size=4),
    ],
    ids=["rows", "one row", "pages"],
)
def test_rows_with_and_without_a_grammar_are_as_alone(options):
    found = check_forms(**options)
    assert len({tuple(tokens) for tokens in found}) > 7


def test_pages_run_out_in_the_middle_of_a_form():
    """The state of an answer is found again from its tokens."""
    interrupted = []
    engine = Engine(
        MODEL, TOKENIZER, max_batch=3, max_context=80, kv_pages=20, page_size=4
    )
    real = engine.scheduler.interrupt

    def interrupt(sequence):
        interrupted.append(len(sequence.written))
        sequence.form = sequence.request.grammar.start(engine.stop_ids)  # forget it
        real(sequence)

    engine.scheduler.interrupt = interrupt
    big = json_grammar(TOKENIZER, {"type": "array", "minItems": 15, "maxItems": 20})
    wanted = [formed([i], 70, big, seed=i, temperature=1.2) for i in range(3)]
    assert together(engine, wanted, 1) == [alone(request) for request in wanted]
    assert any(0 < written for written in interrupted)


def test_a_batch_that_failed_is_tried_again(monkeypatch):
    wanted = [formed([i], 40, seed=i, temperature=1.0) for i in range(3)]
    expected = [alone(request) for request in wanted]
    write, failed = ModelRunner.write, []

    def sometimes(self, sequences):
        found = write(self, sequences)
        if len(sequences) > 1 and len(failed) < 5:
            failed.append(1)
            raise RuntimeError("out of luck")
        return found

    monkeypatch.setattr(ModelRunner, "write", sometimes)
    engine = Engine(MODEL, TOKENIZER, max_batch=3, max_context=64)
    assert together(engine, wanted, 1) == expected and len(failed) == 5


def one_token_late(self, written):
    return ALLOWED(self, written[:-1] if len(written) > 1 else written)


def may_end_early(self, written):
    mask = ALLOWED(self, written)
    mask[self._ends] = True
    return mask


def any_control_token(self, written):
    mask = ALLOWED(self, written)
    mask[256:] = True
    return mask


ALLOWED = GrammarState.allowed


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", [one_token_late, may_end_early, any_control_token])
def test_forms_kill(mutant, monkeypatch):
    monkeypatch.setattr(GrammarState, "allowed", mutant)
    with pytest.raises((AssertionError, ValueError, jsonschema.ValidationError)):
        check_forms(max_batch=4)


@pytest.mark.mutant
def test_a_mask_after_the_filters_leaves_nothing(monkeypatch):
    """Top-p cuts to what the model wants, and the grammar forbids just that."""
    sample, restrict = engine_module.sample, engine_module.restrict

    def late(logits, params, *rest):
        return sample(restrict(logits, *later.pop()), params, *rest)

    def filtered(logits, *rest):
        later.append(rest)
        kept = logits.topk(3).values[:, -1:]
        return logits.masked_fill(logits < kept, -torch.inf)

    later = []
    monkeypatch.setattr(engine_module, "restrict", filtered)
    monkeypatch.setattr(engine_module, "sample", late)
    with pytest.raises(AssertionError):
        check_forms(max_batch=4)


# --- a state is a function of the tokens


def test_a_state_may_be_asked_in_any_order():
    ids = TOKENIZER.encode('{"x": 7, "name": "a"}')
    ends = [EOS, EOS + 2]
    fresh = [GRAMMAR.start(ends).allowed(ids[:n]) for n in range(len(ids) + 1)]
    state = GRAMMAR.start(ends)
    for n in (0, 1, 1, 5, 2, 9, len(ids), 3, len(ids)):
        assert torch.equal(state.allowed(ids[:n]), fresh[n])
    for n, mask in enumerate(fresh):
        assert not mask[256:].any() or n == len(ids)
        assert n == len(ids) or mask[ids[n]]
    assert fresh[-1].nonzero().flatten().tolist() == ends
    with pytest.raises(ValueError, match="no grammar that can be followed"):
        state.allowed([*ids, ids[0]])
    with pytest.raises(ValueError, match="an end token is needed"):
        GRAMMAR.start([])


def test_bytes_of_tokens_and_other_vocabularies(tmp_path):
    """Texts of any language in a string, whatever the tokens are cut into."""
    merged = [b'{"', b'":', b'": ', b"\xe6\xbc", b"\xe6\xbc\xa2", b"00"]
    pairs = {token: 256 + i for i, token in enumerate(merged)}
    words = TiktokenTokenizer({**TOKENIZER.ranks, **pairs})
    save_pretrained(MODEL, TOKENIZER, tmp_path / "model")
    text = json.dumps(
        {"t": "a \u00e9\u6f22 \U0001f600", "100": 1.5}, ensure_ascii=False
    )
    for tokenizer in (TOKENIZER, load(str(tmp_path / "model"))[1], words):
        ids = tokenizer.encode(text)
        assert b"".join(token_bytes(tokenizer, i) for i in ids) == text.encode()
        end = tokenizer.eos_token_id
        state = json_grammar(tokenizer, {"type": "object"}).start([end])
        for n, token in enumerate(ids):
            mask = state.allowed(ids[:n])
            assert mask[token] and len(mask) == tokenizer.vocab_size
            assert not mask[list(control_tokens(tokenizer).values())].any()
        assert state.allowed(ids).nonzero().flatten().tolist() == [end]


def test_a_vocabulary_that_cannot_spell():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab ba abba"] * 20),
        model_writer=model,
        vocab_size=8,
        model_type="char",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer.__new__(SentencePieceTokenizer)
    tokenizer.model = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer.vocab_size = tokenizer.model.vocab_size()
    tokenizer.eos_token_id, tokenizer.controls = tokenizer.model.eos_id(), {}
    with pytest.raises(ValueError, match="no token for '!' alone"):
        json_grammar(tokenizer, POINT)


BAD = {
    "no object": (["a"], "a JSON schema must be an object"),
    "a type": ({"type": "nope"}, "Invalid type: nope"),
    "not enforced": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "elsewhere": ({"$ref": "http://127.0.0.1/x"}, "not present"),
    "a pattern": ({"type": "string", "pattern": "(a"}, "unclosed group"),
    "nothing": ({"type": "integer", "minimum": 2, "maximum": 1}, "Unsatisfiable"),
    "no end": ({"$ref": "#"}, "no grammar that can be followed"),
    "large": ({"enum": ["x" * MAX_SCHEMA]}, "may have 65,536 characters"),
    "its own layout": (
        {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}},
        "uniqueItems",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_schema_that_cannot_be_enforced_is_refused(name, tiny):
    schema, said = BAD[name]
    with pytest.raises(ValueError, match=said) as error:
        json_grammar(TOKENIZER, schema)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    if isinstance(schema, dict):
        asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        body = {"model": NAME, "prompt": [1], "response_format": asked}
        status, content, _ = post(tiny[0], body)
        assert status == 400 and content["error"]["param"] == "response_format"
        assert said in content["error"]["message"]


def test_costly_schemas_are_bounded(tiny):
    """Each is refused, or answered step by step within the library's limits; the server
    stays up.
    """
    nested = {"type": "null"}
    for _ in range(150):
        nested = {"type": "array", "items": nested}
    many = {f"k{i}": {"type": "string", "maxLength": i} for i in range(1200)}
    costly = [
        nested,
        {"type": "object", "properties": many},
        {"type": "string", "pattern": "^((a{0,100}){0,100}){0,100}$"},
        {"type": "string", "pattern": "^(.*a.{20}|b.*c.{15}d)$"},
        {"type": "array", "minItems": 10**8},
    ]
    for schema in costly:
        asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        body = {"model": NAME, "prompt": [1], "max_tokens": 20, "seed": 1}
        status, content, _ = post(tiny[0], {**body, "response_format": asked})
        assert status in (200, 400)
        if status != 200:
            assert "grammar" in content["error"]["message"]
    idle(tiny[1])


def test_a_grammar_of_another_tokenizer_or_without_an_end():
    ranks = {**TOKENIZER.ranks, **{b"a%d" % i: 256 + i for i in range(20)}}
    other = json_grammar(TiktokenTokenizer(ranks), POINT)
    with pytest.raises(ValueError, match="another tokenizer"):
        Engine(MODEL, TOKENIZER, max_batch=1).check(formed([1], grammar=other))
    prompt = torch.tensor([[1]])
    with pytest.raises(ValueError, match="another tokenizer"):
        MODEL.generate(prompt, 3, grammar=other, eos_token_id=EOS)
    with pytest.raises(ValueError, match="give eos_token_id"):
        MODEL.generate(prompt, 3, grammar=GRAMMAR, eos_token_id=[])
    with pytest.raises(ValueError, match="give eos_token_id"):
        MODEL.generate(prompt, 3, grammar=GRAMMAR, eos_token_id=285)  # of no token
    with pytest.raises(ValueError, match="another tokenizer"):
        MODEL.generate(prompt, 3, grammar=GRAMMAR, eos_token_id=0, valid_vocab_size=200)
    with pytest.raises(ValueError, match="leave out grammar"):
        MODEL.generate(prompt, 3, grammar=GRAMMAR, num_beams=2, eos_token_id=EOS)


def test_texts_and_copies():
    options = dict(max_new_tokens=60, temperature=1.2, grammar=GRAMMAR, seed=3)
    found = complete(MODEL, TOKENIZER, "x", **options).removeprefix("x")
    assert "".join(stream(MODEL, TOKENIZER, "x", **options)) == found
    several = complete_many(MODEL, TOKENIZER, ["x", "longer", "y"], **options)
    texts = [found, *(text[text.index("{") :] for text in several)]
    rows = MODEL.generate(
        torch.tensor([[1, 2]]),
        60,
        num_return_sequences=3,
        eos_token_id=EOS,
        valid_vocab_size=TOKENIZER.vocab_size,
        temperature=1.2,
        grammar=GRAMMAR,
        seed=1,
    )[:, 2:].tolist()
    texts += [TOKENIZER.decode([i for i in row if i != EOS]) for row in rows]
    assert len(set(texts)) > 4
    for text in texts:
        jsonschema.validate(json.loads(text), POINT)


# --- over HTTP, with OpenAI's own client


def test_response_formats(tiny):
    port, engine = tiny
    asked = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}
    strict = {**asked["json_schema"], "strict": True, "description": "a point"}
    options = dict(model=NAME, temperature=1, seed=3, n=3, max_tokens=60)
    create = client(port).chat.completions.create
    free = create(messages=USER, response_format={"type": "text"}, **options)
    assert free.choices == create(messages=USER, **options).choices
    formed = create(messages=USER, response_format=asked, **options)
    again = create(
        messages=USER,
        response_format={"type": "json_schema", "json_schema": strict},
        **options,
    )
    contents = [choice.message.content for choice in formed.choices]
    assert contents == [choice.message.content for choice in again.choices]
    for choice in formed.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), POINT)
    streamed = [""] * 3
    for chunk in create(messages=USER, response_format=asked, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert streamed == contents and len(set(contents)) == 3
    objects = client(port).completions.create(
        prompt=[1], extra_body={"response_format": {"type": "json_object"}}, **options
    )
    assert all(choice.text.startswith("{") for choice in objects.choices)
    cut = create(
        messages=USER, response_format=asked, **{**options, "max_tokens": 5, "n": 1}
    ).choices[0]
    assert cut.finish_reason == "length" and cut.message.content.startswith("{")


def test_pydantic_models_of_the_client(tiny):
    from typing import Literal

    from pydantic import BaseModel

    class Step(BaseModel):
        kind: Literal["up", "down"]
        far: bool

    class Way(BaseModel):
        first: Step
        then: Step | None

    answer = client(tiny[0]).chat.completions.parse(
        model=NAME, messages=USER, response_format=Way, seed=2, max_tokens=250
    )
    assert isinstance(answer.choices[0].message.parsed, Way)


WRONG = [
    (3, "response_format"),
    ({}, "response_format.type"),
    ({"type": "xml"}, "response_format.type"),
    ({"type": "json_schema"}, "response_format"),
    ({"type": "text", "json_schema": {"name": "a", "schema": {}}}, "response_format"),
    ({"type": "json_schema", "json_schema": {"schema": {}}}, "json_schema.name"),
    ({"type": "json_schema", "json_schema": {"name": "a"}}, "json_schema.schema"),
    (
        {"type": "json_schema", "json_schema": {"name": "a", "schema": [1]}},
        "json_schema.schema",
    ),
    ({"type": "json_object", "more": 1}, "response_format.more"),
]


@pytest.mark.parametrize("asked, param", WRONG)
def test_wrong_response_formats(asked, param, tiny):
    body = {"model": NAME, "prompt": [1], "response_format": asked}
    status, content, _ = post(tiny[0], body)
    error = content["error"]
    assert status == 400 and error["param"].endswith(param), error
    assert error["message"].startswith("response_format")


def test_without_the_library(tiny, monkeypatch):
    json_grammar.__globals__["_vocabulary"].cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    body = {"model": NAME, "prompt": [1], "response_format": {"type": "json_object"}}
    status, content, _ = post(tiny[0], body)
    assert status == 400 and content["error"]["param"] == "response_format"
    assert "pip install" in content["error"]["message"]
    del body["response_format"]
    assert post(tiny[0], body)[0] == 200


def test_a_client_that_goes_in_the_middle_of_a_form(tiny):
    port, engine = tiny
    long = {"type": "array", "minItems": 500}
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": long}}
    chunks = client(port).chat.completions.create(
        model=NAME, messages=USER, response_format=asked, stream=True
    )
    for _ in range(4):
        next(chunks)
    chunks.close()
    idle(engine)


# a form that is compiled, and becomes too much while an answer follows it
TIRING = {"type": "string", "pattern": "^(a|b)*a(a|b){9}$"}


def test_the_librarys_limit_within_an_answer_is_the_clients_error(tiny, monkeypatch):
    """The answer ends with a line of status 400, its neighbours go on."""
    limits = {**Grammar.__init__.__globals__["_LIMITS"], "step_lexer_fuel": 300}
    monkeypatch.setitem(Grammar.__init__.__globals__, "_LIMITS", limits)
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": TIRING}}
    body = {"model": NAME, "prompt": [1], "max_tokens": 40, "seed": 1}
    before = post(tiny[0], {**body, "max_tokens": 60})[1]["choices"][0]["text"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        other = pool.submit(post, tiny[0], {**body, "max_tokens": 60})
        found = pool.submit(post, tiny[0], {**body, "response_format": asked})
        status, content, _ = found.result()
        assert other.result()[1]["choices"][0]["text"] == before
    said = content["error"]["message"]
    assert status == 400 and "tokens, ask for a simpler form: lexer" in said
    assert "\n" not in said and len(said) < 400
    with pytest.raises(openai.APIError, match="ask for a simpler form"):
        for _ in client(tiny[0]).completions.create(
            model=NAME,
            prompt=[1],
            max_tokens=40,
            seed=1,
            stream=True,
            extra_body={"response_format": asked},
        ):
            pass
    idle(tiny[1])
    assert post(tiny[0], body)[0] == 200


def test_a_grammar_that_gets_too_complex_ends_its_own_answer(log):
    """The row fails, in one line; its neighbour is as alone."""
    grammar = json_grammar(TOKENIZER, {"type": "array", "minItems": 20})
    fine = formed([3], 20, seed=3, temperature=1.0)
    engine = Engine(MODEL, TOKENIZER, max_batch=2, max_context=64)
    start, count = grammar.start, []

    class Tired:
        vocab_size = grammar.vocab_size

        def start(self, ends):
            state = start(ends)

            class State:
                def allowed(self, written):
                    count.append(len(written))
                    if len(written) == 5:
                        raise GrammarError("too long")
                    return state.allowed(written)

            return State()

    found = answers(engine, formed([1], 30, Tired(), temperature=1.0), fine)
    assert text_of(found[0])[1] == "error" and "too long" in found[0][-1].text
    assert found[0][-1].status == 400
    tokens = [entry.token for delta in found[1] for entry in delta.logprobs]
    assert tokens == alone(fine)


# --- on the command line


def test_generate_with_a_schema_file(tmp_path, capsys):
    from qwen_analog.cli import main

    model, file = str(tmp_path / "model"), tmp_path / "schema.json"
    save_pretrained(MODEL, TOKENIZER, model)
    file.write_text(json.dumps(POINT))
    words = ["generate", "x", "--model", model, "--seed", "1"]
    words += ["--max-new-tokens", "60", "--json-schema", str(file)]
    assert main(words) == 0
    text = capsys.readouterr().out.strip().removeprefix("x")
    jsonschema.validate(json.loads(text), POINT)
    file.write_text("{")
    assert str(file) in refused(capsys, *words)
    file.write_text('{"type": "nope"}')
    said = refused(capsys, *words)
    assert str(file) in said and "Invalid type: nope" in said
    file.write_text(json.dumps(POINT))
    said = refused(capsys, *words[:4], "--num-beams", "2", *words[-2:])
    assert "--json-schema" in said
