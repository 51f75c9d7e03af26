"""lm-eval through the adapter: the harness's conventions, its names of options."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from book import scramble_
from weights_helpers import edit
from test_scoring import BYTES, CONFIG, MODEL, TEXTS, hugging_faces, ids_of, nll_after

from qwen_analog import lm_eval_adapter as module
from qwen_analog.config import QwenConfig
from qwen_analog.generate import generate
from qwen_analog import load
from qwen_analog.hf import save_pretrained
from qwen_analog.jsonl import write_jsonl
from qwen_analog.lm_eval_adapter import lm_eval_model, paired_scores, run_tasks
from qwen_analog.model import QwenForCausalLM
from qwen_analog.scoring import document_nll, token_nll
from qwen_analog.bpe import train_bpe
from qwen_analog.tokenizer import TiktokenTokenizer


class Request:
    def __init__(self, *args):
        self.args = args


def test_lm_eval_loglikelihood_equals_transformers():
    theirs = hugging_faces()
    adapter = lm_eval_model(MODEL, BYTES, batch_size=2)
    requests = [
        ("The cat", " sat"),
        ("", "alone"),
        ("a context that is longer than the model", " can hold"),
        ("ends with a space ", "x"),
        (" ", "y"),
    ]
    for (context, continuation), (loglikelihood, greedy) in zip(
        requests,
        adapter.loglikelihood([Request(*r) for r in requests], disable_tqdm=True),
    ):
        spaces = len(context) - len(context.rstrip())
        continuation = context[len(context) - spaces :] + continuation
        ids = ids_of(context[: len(context) - spaces] + continuation)[-25:]
        with torch.no_grad():
            log_p = theirs(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        n = len(BYTES.encode(continuation))
        picked = log_p[-n:].gather(1, torch.tensor(ids[-n:])[:, None])
        assert abs(picked.sum().item() - loglikelihood) < 1e-4
        assert greedy == (log_p[-n:].argmax(-1) == torch.tensor(ids[-n:])).all().item()


def test_lm_eval_says_what_is_greedy():
    def best(text):
        return generate(MODEL, torch.tensor([ids_of(text)]), 1, temperature=0)[
            0, -1
        ].item()

    context = next(
        text for text in map(chr, range(33, 127)) if best(text) < 94
    )  # the likeliest next id is a printable character
    likely = BYTES.decode([best(context)])
    other = "a" if best(context + likely) != BYTES.encode("a")[0] else "b"
    adapter = lm_eval_model(MODEL, BYTES)
    requests = [
        Request(context, likely),
        Request(context, likely + other),
        Request(context, other if other != likely else "c"),
    ]
    assert [
        greedy for _, greedy in adapter.loglikelihood(requests, disable_tqdm=True)
    ] == [True, False, False]


def test_lm_eval_rolling_has_the_harness_ssliding_windows():
    from lm_eval.utils import get_rolling_token_windows

    adapter = lm_eval_model(MODEL, BYTES)
    for text in TEXTS[:3]:
        expected = 0.0
        for inputs, targets in get_rolling_token_windows(
            BYTES.encode(text), BYTES.eos_token_id, 24, 1
        ):
            log_p = MODEL(torch.tensor([inputs]))[0].log_softmax(-1)[-len(targets) :]
            expected += log_p.gather(1, torch.tensor(targets)[:, None]).sum().item()
        assert abs(adapter.loglikelihood_rolling([Request(text)])[0] - expected) < 1e-3


def test_lm_eval_generate_until():
    adapter = lm_eval_model(MODEL, BYTES)
    ids = ids_of("The cat")
    written = generate(
        MODEL,
        torch.tensor([ids]),
        12,
        temperature=0,
        eos_token_id=BYTES.eos_token_id,
        valid_vocab_size=BYTES.vocab_size,
    )[0, len(ids) :]
    text = BYTES.decode([i for i in written.tolist() if i != BYTES.eos_token_id])
    whole, cut, plain = adapter.generate_until(
        [
            Request("The cat", {"until": ["nowhere"], "max_gen_toks": 12}),
            Request("The cat", {"until": ["nowhere", text[3:5]], "max_gen_toks": 12}),
            Request("The cat", {"until": text[2:3], "max_gen_toks": 12}),
        ]
    )
    assert (
        whole == text
        and cut == text.split(text[3:5])[0]
        and plain == text.split(text[2])[0]
    )
    with pytest.raises(ValueError, match="max_gen_toks 24 leaves no room"):
        adapter.generate_until([Request("x", {"max_gen_toks": 24})])
    with pytest.raises(ValueError, match="a continuation has 30 tokens"):
        adapter.loglikelihood([Request("x", "y" * 30)], disable_tqdm=True)


@pytest.mark.parametrize(
    "options, most",
    [
        ({"max_gen_toks": 5}, 5),
        ({"max_new_tokens": 5}, 5),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 5}, 5),
        ({"max_gen_toks": "5"}, 5),
        ({"max_gen_toks": 5, "max_new_tokens": 9}, 5),
        ({"max_gen_toks": 5, "until": None}, 5),
        ({"max_gen_toks": 5, "until": [None, ""]}, 5),
        ({"max_gen_toks": 5, "until": ()}, 5),
        ({"max_gen_toks": 0}, 0),
        ({"max_length": 9}, 5),
        ({"max_length": 999, "max_gen_toks": 2}, 20),
        ({"max_gen_toks": 5, "do_sample": True, "seed": 1}, 5),
        (
            {
                "max_gen_toks": 5,
                "temperature": 0.7,
                "top_k": 0,
                "top_p": 1.0,
                "seed": 1,
            },
            5,
        ),
        (
            {"max_gen_toks": 5, "temperature": None, "do_sample": None, "num_beams": 1},
            5,
        ),
    ],
)
def test_lm_eval_s_names_of_lengths_and_stops(options, most, monkeypatch):
    taken = []
    monkeypatch.setattr(
        module,
        "stream",
        lambda model, tokenizer, **options: taken.append(options) or iter(["text"]),
    )
    assert lm_eval_model(MODEL, BYTES).generate_until([Request("abc", options)]) == [
        "text"
    ]  # a prompt of four tokens
    (given,) = taken
    assert (
        given["max_new_tokens"] == most
        and given["stop"] == []
        and given["prompt"] == ids_of("abc")
    )
    sampled = options.get("do_sample") or options.get("temperature")
    assert (
        given["temperature"] == (options.get("temperature") or 1.0 if sampled else 0.0)
        and "top_k" not in given
    )


@pytest.mark.parametrize(
    "options, said",
    [
        ({"max_gen_toks": -1}, "max_gen_toks"),
        ({"max_gen_toks": "many"}, "max_gen_toks"),
        ({"max_length": 3}, "max_length 3"),
        ({"until": 5}, "until"),
        ({"until": [5]}, "until"),
        ({"num_beams": 4}, "num_beams"),
        ({"tempreature": 1}, "tempreature"),
    ],
)
def test_lm_eval_options_that_cannot_be_are_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        lm_eval_model(MODEL, BYTES).generate_until(
            [Request("abc", {"max_gen_toks": 2, **options})]
        )


def test_lm_eval_charges_for_what_a_continuation_changes():
    """A continuation may melt into the context's last tokens: then all that comes after
    what stays the same counts.
    """
    tokenizer = TiktokenTokenizer(train_bpe(["abcd abcd abcd é é é"] * 9, 264))
    adapter = lm_eval_model(MODEL, tokenizer)
    for context, continuation in (
        ("xa", "bcd"),
        ("xab", "cde"),
        ("e", "\u0301"),
        ("xe", "\u0301y"),
        ("abc", "d"),
        ("xab", "y"),
    ):
        before, whole = (
            tokenizer.encode(context),
            tokenizer.encode(context + continuation),
        )
        same = len(before)
        while whole[:same] != before[:same]:
            same -= 1
        ((value, _),) = adapter.loglikelihood(
            [Request(context, continuation)], disable_tqdm=True
        )
        nats = token_nll(MODEL, tokenizer, [context + continuation])[0]
        assert abs(value + nats[same:].sum()) < 1e-4 and value < 0, (
            context,
            continuation,
        )
    for context, continuation in (("a", ""), ("", "")):
        with pytest.raises(ValueError, match="empty"):
            adapter.loglikelihood([Request(context, continuation)], disable_tqdm=True)


def test_lm_eval_runs_a_task(tmp_path, no_environment):
    """A task of local data, from its dictionary; the accuracy is counted by hand."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    questions = [
        {"question": q, "choices": [" yes", " no", " maybe"], "answer": i % 3}
        for i, q in enumerate("abcdefgh")
    ]
    (tmp_path / "task.jsonl").write_text(
        "".join(json.dumps(q) + "\n" for q in questions)
    )
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    results = simple_evaluate(
        model=lm_eval_model(MODEL, BYTES),
        tasks=[task],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    correct = 0
    for q in questions:
        context = document_nll(MODEL, BYTES, f"{q['question']}:")[0]
        nats = [
            document_nll(MODEL, BYTES, f"{q['question']}:{choice}")[0] - context
            for choice in q["choices"]
        ]
        correct += int(np.argmin(nats)) == q["answer"]
    assert results["results"]["tiny"]["acc,none"] == correct / len(questions)
    assert 0 < correct < len(questions)


# tasks from files


def task(name, kind, rest):
    """The file of a task whose questions are in questions.jsonl."""
    return (
        f"task: {name}\n"
        "dataset_path: json\n"
        "dataset_kwargs: {data_files: {test: questions.jsonl}}\n"
        "test_split: test\n"
        f"output_type: {kind}\n"
        'doc_to_text: "{{title}} is"\n' + rest
    )


CHOICES = task(
    "choices",
    "multiple_choice",
    "doc_to_choice: answers\n"
    "doc_to_target: right\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
)
LAST_WORD = task(
    "last_word",
    "loglikelihood",
    'doc_to_target: " {{answers[right]}}"\n'
    "metric_list: [{metric: perplexity}, {metric: acc}]\n",
)
WRITTEN = task(
    "written",
    "generate_until",
    'doc_to_target: "{{wanted}}"\n'
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}\n'
    "metric_list: [{metric: exact_match}]\n",
)
TASKS = {"choices.yaml": CHOICES, "last_word.yaml": LAST_WORD, "written.yaml": WRITTEN}


@pytest.fixture
def no_environment(monkeypatch):
    """The harness does not ask pip, gcc and others about this machine."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def tasks(folder, no_environment):
    """A model of 128 positions, and three tasks of ten questions in files; five of the
    texts to be written are what transformers' model writes.
    """
    torch.manual_seed(0)
    changed = {"max_position_embeddings": 128, "vocab_size": BYTES.vocab_size}
    config = QwenConfig(**{**CONFIG.to_dict(), **changed})
    model = scramble_(QwenForCausalLM(config)).eval()
    save_pretrained(model, BYTES, "theirs")
    written = {f"thing {i}": after(model, f"thing {i} is") for i in range(80)}
    titles = list(written)[:10]
    questions = [
        {
            "title": title,
            "answers": ["an animal", f"the {i}th of them", "not at all large"],
            "right": i % 3,
            "wanted": "nothing" if i % 2 else written[title],
        }
        for i, title in enumerate(titles)
    ]
    write_jsonl(questions, "questions.jsonl")
    for name, text in TASKS.items():
        Path(name).write_text(text)
    return model


def after(model, text):
    """What the model writes greedily after a text, up to a line's end, without control
    tokens.
    """
    ids = torch.tensor([BYTES.encode(text)])
    eos = BYTES.eos_token_id
    ids = generate(model, ids, 8, temperature=0, eos_token_id=eos)[0, ids.shape[1] :]
    return BYTES.decode([i for i in ids.tolist() if i < 256]).partition("\n")[0]


def test_tasks_are_scored_as_the_harness_scores_transformers(tasks):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    ours = run_tasks(tasks, BYTES, list(TASKS))
    theirs = simple_evaluate(
        model=HFLM(pretrained="theirs", dtype="float32", device="cpu", batch_size=4),
        tasks=list(TASKS),
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    for name, task in ours.items():
        assert task["questions"] == 10
        for metric, (value, _) in task["scores"].items():
            expected = theirs["results"][name][f"{metric},none"]
            assert value == pytest.approx(expected, rel=1e-4), (name, metric)
    assert 0 < ours["written"]["scores"]["exact_match"][0] <= 0.6
    samples = theirs["samples"]["choices"]
    assert ours["choices"]["by_question"]["acc"] == [row["acc"] for row in samples]
    # another beginning, other probabilities
    begun = run_tasks(tasks, BYTES, ["last_word.yaml"], add_bos_token=True)
    perplexity = begun["last_word"]["scores"]["perplexity"][0]
    assert perplexity != pytest.approx(ours["last_word"]["scores"]["perplexity"][0])


def test_control_tokens_in_what_is_written(tasks):
    """They are no text, unless the tokenizer's file calls one of them not special; as a
    stop string they end it.
    """
    from lm_eval.models.huggingface import HFLM

    texts = [f"thing {i} is" for i in range(60)]
    prompts = [torch.tensor([BYTES.encode(text)]) for text in texts]
    rows = [generate(tasks, prompt, 12, temperature=0)[0, -12:] for prompt in prompts]
    ids = [i for row in rows for i in row.tolist() if i > 256]
    common, other = sorted(set(ids), key=ids.count)[-2:]
    names = {common: BYTES.decode([common]), other: BYTES.decode([other])}
    added = json.loads(Path("theirs/tokenizer.json").read_text())["added_tokens"]
    for token in added:
        token["special"] &= token["id"] != common
    edit(Path("theirs"), "tokenizer.json", added_tokens=added)
    theirs = HFLM(pretrained="theirs", dtype="float32", device="cpu", batch_size=1)
    _, read = load("theirs")
    found = []
    for until in ("nowhere", *names.values()):
        options = {"until": [until], "max_gen_toks": 12, "do_sample": False}
        asked = [Request(text, options) for text in texts]
        expected = theirs.generate_until(asked, disable_tqdm=True)
        ours = lm_eval_model(tasks, read, add_bos_token=False)
        assert ours.generate_until(asked) == expected
        found.append("".join(expected))
    assert names[common] in found[0] and names[common] not in found[1]
    assert all(names[other] not in text for text in found)
    assert len(found[2]) < len(found[0])


GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, GEMMA])
def test_tasks_as_conversations_are_scored_as_the_harness_scores(tasks, template):
    """Qwen's own form, and one that trims and takes no system message; solved questions
    are turns, and an answer may be begun.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    more = 'description: "Be right."\ngen_prefix: "It is "\n'
    Path("begun.yaml").write_text(WRITTEN.replace("written", "begun") + more)
    names, tokenizer = [*TASKS, "begun.yaml"], BYTES
    if template:
        edit(Path("theirs"), "tokenizer_config.json", chat_template=template)
        Path("theirs/chat_template.jinja").unlink(missing_ok=True)
        _, tokenizer = load("theirs")
    asked = {"num_fewshot": 1, "limit": 4, "apply_chat_template": True}
    ours = run_tasks(tasks, tokenizer, names, **asked)
    theirs = simple_evaluate(
        model=HFLM(pretrained="theirs", dtype="float32", device="cpu", batch_size=4),
        tasks=names,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
        **asked,
    )
    for name, task in ours.items():
        for metric, (value, _) in task["scores"].items():
            expected = theirs["results"][name][f"{metric},none"]
            assert value == pytest.approx(expected, rel=1e-4), (name, metric)
    plain = run_tasks(tasks, tokenizer, ["last_word.yaml"], 1, 4)
    before = plain["last_word"]["scores"]["perplexity"][0]
    assert before != pytest.approx(ours["last_word"]["scores"]["perplexity"][0])


def test_limit_and_solved_questions(tasks):
    few = run_tasks(tasks, BYTES, ["choices.yaml"], limit=4)
    assert few["choices"]["questions"] == 4
    assert len(few["choices"]["by_question"]["acc"]) == 4


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "task.yaml: there is no such task file"),
        (CHOICES.replace("questions.jsonl", "lost.jsonl"), "task.yaml: no task.*lost"),
        ("task: [", "task.yaml: no task can be made of it"),
        ("metric_list: []", "task.yaml: no task can be made of it"),
    ],
)
def test_a_task_that_cannot_be_read_is_named(tasks, text, message):
    if text is not None:
        Path("task.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        run_tasks(tasks, BYTES, ["task.yaml"])
    assert "\n" not in str(raised.value)


def test_two_tasks_of_one_name_are_refused(tasks):
    Path("b").mkdir()
    Path("b/choices.yaml").write_text(CHOICES.replace(" is", " was"))
    message = "b/choices.yaml: the task choices is in choices.yaml too: give one of"
    with pytest.raises(ValueError, match=message):
        run_tasks(tasks, BYTES, ["last_word.yaml", "choices.yaml", "b/choices.yaml"])


def test_a_task_that_the_harness_cannot_score_is_named(tasks):
    for name in ("fails", "fails_too"):
        text = task(name, "multiple_choice", "doc_to_choice: answers\n")
        text += "doc_to_target: right\nmetric_list: [{metric: likelihood}]\n"
        Path(f"{name}.yaml").write_text(text)
    message = (
        r"^fails.yaml, fails_too.yaml: lm-eval fails on a task \(TypeError: .*out$"
    )
    with pytest.raises(ValueError, match=message):
        run_tasks(tasks, BYTES, ["fails.yaml", "fails_too.yaml"])


def test_paired_scores():
    difference, error = paired_scores([1, 1, 0, 0], [1, 1, 0, 1])
    assert difference == 0.25 and error == pytest.approx(0.25)
    with pytest.raises(ValueError, match="at least 2: 1 and 1"):
        paired_scores([1], [0])
    with pytest.raises(ValueError, match="same questions twice.*2 and 3"):
        paired_scores([1, 0], [0, 1, 1])
