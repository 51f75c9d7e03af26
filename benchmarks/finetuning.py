"""Fine-tune the model of `make train` on questions, rightly and wrongly, and SmolLM2 on
a style; keep what each has learned and forgotten, and what each says in
`qwen-analog chat` before and after, in finetuning.json.

    python benchmarks/finetuning.py questions RUNS data/wiki/wiki.jsonl MODEL
    python benchmarks/finetuning.py style RUNS data/wiki/wiki.jsonl
    python benchmarks/finetuning.py chat RUNS MODEL

MODEL is checkpoints/final. The runs are kept in the directory RUNS. A run that is
there, or a part that is in the file already, is left out; what is said in `chat` is
asked anew. The chapter on fine-tuning shows losses of the second part.
"""

import json
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from qwen_analog import finetune, load
from qwen_analog.chat_template import chat_ids
from qwen_analog.checkpoint import load_checkpoint
from qwen_analog.corpora import question_documents, style_documents
from qwen_analog.data import held_out_dataset
from qwen_analog.distributed import DistributedContext
from qwen_analog.finetune import answer_end, chat_datasets, read_conversations
from qwen_analog.generate import stop_ids
from qwen_analog.jsonl import write_jsonl
from qwen_analog.step import evaluate
from qwen_analog.token_cache import tokenize_files
from qwen_analog.train import train
from qwen_analog.train_config import FINETUNING, TrainConfig

TARGET = Path(__file__).with_name("finetuning.json")
QUESTIONS, ANSWER = 30, 60  # that are asked, and the longest answer in tokens
STEPS, RATE = 400, 3e-4  # held-out answers cost fewer bits than at 1e-3
OTHERS = (
    "What is a bridge?",
    "How do I learn to swim?",
    "Why is ice slippery?",
    "What is a library for?",
    "How do I cook rice?",
    "What is chess?",
    "Why do people yawn?",
    "How do I plan a trip?",
    "What is the equator?",
    "How does a bicycle stay up?",
)


# on a processor that computes fp32 faster than bf16; so small a run fits into memory
FAST = {"precision": "fp32", "activation_checkpointing": "none"}


def settings(**changes) -> TrainConfig:
    values = dict(
        sequence_length=160,
        micro_batch_size=8,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        learning_rate=RATE,
        eval_every=10_000,
        save_every=10_000,
        eval_sequences=64,
        tensorboard=False,
    )
    return TrainConfig.create({**FINETUNING, **values, **changes})


@torch.inference_mode()
def answers(model, tokenizer, prompts, extra_end=None):
    """Greedy answers to prompts of ids: each text, and whether it stopped by itself."""
    model.eval()
    ends = {*stop_ids(model, tokenizer), *([extra_end] if extra_end else [])}
    found = []
    for prompt in prompts:
        row = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=ANSWER,
            temperature=0,
            eos_token_id=list(ends),
            valid_vocab_size=tokenizer.vocab_size,
        )[0].tolist()[len(prompt) :]
        stopped = row[-1] in ends
        text = tokenizer.decode(row[:-1] if stopped else row)
        found.append((text, stopped))
    return found


def asked(tokenizer, question):
    return chat_ids(tokenizer, [{"role": "user", "content": question}])


def bits(model, data, config):
    with DistributedContext() as context:
        return evaluate(model, data, config, context)["bits_per_byte"]


@contextmanager
def learned(change):
    """Inside, `change(example, end)` spoils which tokens of a conversation count."""
    right = finetune.encode_conversation

    def wrong(tokenizer, messages, end, *rest):
        example = right(tokenizer, messages, end, *rest)
        change(example, end)
        return example

    finetune.encode_conversation = wrong
    try:
        yield
    finally:
        finetune.encode_conversation = right


def everything(example, end):
    example.learned[1:] = True


def all_but_the_end(example, end):
    example.learned &= example.ids != end


def nothing(example, end):
    pass


class Book:
    """What was found, on the disk after each part."""

    def __init__(self):
        self.read()

    def read(self):
        text = TARGET.read_text(encoding="utf-8") if TARGET.exists() else "{}"
        self.parts = json.loads(text)

    def write(self, name, values):
        self.read()
        self.parts[name] = values
        text = json.dumps(self.parts, indent=1, ensure_ascii=False) + "\n"
        TARGET.write_text(text, encoding="utf-8")
        print(name, {k: v for k, v in values.items() if k != "samples"}, flush=True)


def measure(model, tokenizer, questions, prompts, held_out, texts, config):
    end = answer_end(tokenizer)
    said = answers(model, tokenizer, prompts, end)
    first = zip(questions, said)
    defined = (s and re.search(r"\b(is|are|was|were) (an?|the)\b", t) for t, s in said)
    return {
        "defined": sum(map(bool, defined)) / len(said),
        "stopped": sum(stopped for _, stopped in said) / len(said),
        "question_back": sum(text.strip().endswith("?") for text, _ in said)
        / len(said),
        "bits_of_answers": bits(model, held_out, config),
        "bits_of_texts": bits(model, texts, config),
        "samples": [[q, text, stopped] for q, (text, stopped) in first][:6],
    }


def counts(split, config):
    """How many examples are learned and held out, and how often the run sees each."""
    rows = config.max_steps * config.micro_batch_size
    return {
        "examples": [len(part.examples) for part in split],
        "passes": rows / len(split[0].epoch_rows(0)),
    }


def corpus(tokenizer, path, config):
    documents = tokenize_files([path], tokenizer, 0.05)
    return held_out_dataset(documents, config.sequence_length)


def on_questions(book, folder, wiki, base):
    changes = {"data": [f"{folder}/questions.jsonl"], **FAST}
    config = settings(**changes)
    write_jsonl(question_documents(), config.data[0])  # makes the directory
    model, tokenizer = load(base, "cpu")
    examples, _ = read_conversations(config.data, tokenizer, config.sequence_length)
    fraction = config.heldout_fraction
    split = chat_datasets(examples, config.sequence_length, 0, fraction)
    held_out = split[1]
    texts = corpus(tokenizer, wiki, config)
    rows = [json.loads(line) for line in open(config.data[0], encoding="utf-8")]
    kept = {example.key for example in held_out.examples}
    questions = [row["prompt"] for row in rows if row["title"] in kept][:QUESTIONS]
    prompts = [asked(tokenizer, question) for question in questions]
    plain = [tokenizer.encode(f"Question: {q}\nAnswer:") for q in questions]
    shared = held_out, texts, config
    base_steps = load_checkpoint(base)["step"]
    values = {"base_steps": base_steps, "steps": STEPS, "asked": questions}
    book.write("questions", {**values, **counts(split, config)})
    if "before" not in book.parts:
        values = measure(model, tokenizer, questions, prompts, *shared)
        book.write("before", values)
    for name, change, rate in (
        ("after", nothing, RATE),
        ("no end", all_but_the_end, RATE),
        ("rate x 10", nothing, 3e-3),
        ("everything", everything, RATE),
    ):
        if name in book.parts:
            continue
        place = f"{folder}/{rate}{change.__name__}"
        if not Path(place, "final").exists():
            run = settings(**changes, learning_rate=rate, output_dir=place)
            with learned(change):
                train(run, init_from=base)
        model, tokenizer = load(place, "cpu")
        book.write(name, measure(model, tokenizer, questions, prompts, *shared))
        if name == "after":
            values = measure(model, tokenizer, questions, plain, *shared)
            book.write("other template", values)


def curve(folder, key):
    """Return [step, loss] of each line of a run's metrics that has `key`."""
    text = Path(folder, "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [[line["step"], line[key]] for line in lines if key in line]


def on_style(book, folder, wiki):
    path = f"{folder}/style.jsonl"
    write_jsonl(style_documents(), path)
    changes = dict(
        data=[path],
        sequence_length=256,
        micro_batch_size=2,
        max_steps=30,
        heldout_fraction=0.15,
        eval_every=5,
        eval_sequences=8,
        log_every=1,
        activation_checkpointing="none",
    )
    config = settings(**changes)
    examples, _ = read_conversations([path], load("smollm2", "cpu")[1], 256)
    split = chat_datasets(examples, 256, 0, config.heldout_fraction)
    held_out = split[1]
    book.write("style", counts(split, config))
    for name, change, rate in (
        ("smollm2 before", nothing, 0),
        ("smollm2 after", nothing, 5e-5),
        ("smollm2 rate x 10", nothing, 5e-4),
        ("smollm2 no end", all_but_the_end, 5e-5),
    ):
        if name in book.parts:
            continue
        place = f"{folder}/style{rate}{change.__name__}"
        if rate and not Path(place, "final").exists():
            run = settings(**changes, learning_rate=rate, output_dir=place)
            with learned(change):
                train(run, init_from="smollm2")
        model, tokenizer = load(place if rate else "smollm2", "cpu")
        texts = corpus(tokenizer, wiki, config)
        prompts = [asked(tokenizer, question) for question in OTHERS]
        shared = held_out, texts, config
        values = measure(model, tokenizer, OTHERS, prompts, *shared)
        if rate:
            values["training"] = curve(place, "loss")
            values["heldout"] = curve(place, "heldout_loss")
        book.write(name, values)


def said_in_chat(model, question):
    """What `qwen-analog chat` prints for a question, behind its greeting."""
    command = [sys.executable, "-m", "qwen_analog", "chat", "--model", str(model)]
    command += ["--temperature", "0", "--max-new-tokens", str(ANSWER)]
    options = {"capture_output": True, "text": True, "check": True}
    printed = subprocess.run(command, input=question, **options).stdout
    greeting, answer = re.split("Ctrl-D.*\n", printed, maxsplit=1)
    return answer.strip()


def in_chat(book, folder, base):
    own = book.parts["questions"]["asked"]
    for name, model, questions in (
        ("before", base, own[:2] + own[-2:]),
        ("after", f"{folder}/{RATE}nothing", own[:2] + own[-2:]),
        ("smollm2 before", "smollm2", OTHERS[:4]),
        ("smollm2 after", f"{folder}/style5e-05nothing", OTHERS[:4]),
    ):
        values = {question: said_in_chat(model, question) for question in questions}
        book.write(f"chat {name}", values)


PARTS = {"questions": on_questions, "style": on_style, "chat": in_chat}


if __name__ == "__main__":
    part, folder, *sources = sys.argv[1:]
    PARTS[part](Book(), folder, *sources)
