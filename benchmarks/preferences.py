"""Teach SmolLM2 by DPO to answer in one sentence: writes preferences.json beside this
file. Two minutes on a CPU core.

    python benchmarks/preferences.py

SmolLM2 answers each question once. The pair is this answer, cut at 32 tokens, and its
first sentence, which is preferred. The chapter on preferences shows what comes of it.
"""

import json
from pathlib import Path

import torch

import qwen_analog
from qwen_analog.chat_template import chat_ids
from qwen_analog.finetune import answer_end
from qwen_analog.lora import add_lora
from qwen_analog.preferences import pair_batch, preference_loss, sequence_log_probs

TARGET = Path(__file__).with_name("preferences.json")
QUESTIONS = (
    "Why is the sky blue?",
    "How do bees make honey?",
    "Why do we sleep?",
    "How does a car work?",
    "What is music?",
    "What is a volcano?",
)
HELD_OUT = ("What is a desert?", "How do plants grow?")
BETA, STEPS, BATCH, LONGEST = 0.1, 6, 2, 32
RATES = (3e-4, 2e-3)


def answer(model, tokenizer, question):
    """Return the ids of a question and of the greedy answer, with its end."""
    prompt = chat_ids(tokenizer, [{"role": "user", "content": question}])
    end = answer_end(tokenizer)
    ids = torch.tensor([prompt])
    output = model.generate(ids, LONGEST, temperature=0, eos_token_id=end)
    return prompt, output[0, len(prompt) :].tolist()


def make_pair(model, tokenizer, question):
    """Return the ids of prompt, first sentence and whole answer."""
    prompt, whole = answer(model, tokenizer, question)
    first = tokenizer.decode(whole).partition(". ")[0] + "."
    return prompt, [*tokenizer.encode(first), answer_end(tokenizer)], whole


@torch.no_grad()
def measure(model, tokenizer, pairs):
    """Return mean log-probabilities of held-out pairs, and the answers now."""
    chosen, rejected = sequence_log_probs(model, *pair_batch(pairs)).chunk(2)
    answers = [answer(model, tokenizer, question)[1] for question in HELD_OUT]
    return {
        "chosen": chosen.mean().item(),
        "rejected": rejected.mean().item(),
        "tokens": sum(map(len, answers)) / len(answers),
        "answers": [tokenizer.decode(ids) for ids in answers],
    }


def taught(pairs, rate):
    """Return SmolLM2 after some steps of DPO."""
    torch.manual_seed(0)
    model, _ = qwen_analog.load("smollm2", device="cpu")
    add_lora(model, rank=8, alpha=16)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=rate, weight_decay=0.0)
    for _ in range(STEPS):
        picked = torch.randperm(len(pairs))[:BATCH].tolist()
        batch = pair_batch([pairs[i] for i in picked])
        loss = preference_loss(model, *batch, beta=BETA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rate {rate}: loss {loss.item():.3f}", flush=True)
    return model


def main():
    torch.set_num_threads(1)
    model, tokenizer = qwen_analog.load("smollm2", device="cpu")
    pairs = [make_pair(model, tokenizer, question) for question in QUESTIONS]
    held_out = [make_pair(model, tokenizer, question) for question in HELD_OUT]
    result = {"pairs": len(pairs), "beta": BETA, "steps": STEPS}
    result["example"] = [tokenizer.decode(ids) for ids in pairs[1]]
    result["before"] = measure(model, tokenizer, held_out)
    for rate in RATES:
        name = f"rate {rate}"
        result[name] = measure(taught(pairs, rate), tokenizer, held_out)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
