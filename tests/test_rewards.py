"""Learning from rewards, beside TRL; runs that are killed; rewards that fail."""

import json
import math
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from book import scramble_
from helpers import refused, same, small_model
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from training import (  # noqa: F401
    distance,
    entries,
    final_weights,
    folder,
    read_the_same,
    resumed_to_the_bit,
    settings,
    train_on,
    training_state,
)
from weights_helpers import TOKENIZER, small

from qwen_analog import QwenForCausalLM
from qwen_analog import engine as engine_module
from qwen_analog import rewards as module
from qwen_analog.chat_template import chat_ids
from qwen_analog.checkpoint import save_checkpoint
from qwen_analog.cli import main
from qwen_analog.config import GenerationDefaults
from qwen_analog.engine import ModelRunner
from qwen_analog.finetune import read_all, read_conversations
from qwen_analog.hf_tokenizer import HFTokenizer
from qwen_analog.jsonl import DataError, read_lines
from qwen_analog.lora import add_lora
from qwen_analog.loss import IGNORE_INDEX
from qwen_analog.preferences import read_pair, token_log_probs
from qwen_analog.rewards import (
    PAGE_SIZE,
    REWARDS,
    AnswerEngine,
    InOrder,
    answer_requests,
    draw_seed,
    grade,
    group_advantages,
    grpo_loss,
    last_number,
    load_reward,
    read_question,
    roll_out,
)
from qwen_analog.sampling import LogitsError
from qwen_analog.train import train
from qwen_analog.train_config import TrainConfig

pytest_plugins = ["weights_helpers"]

# --- beside TRL


@pytest.fixture(scope="module")
def trl_trainer(tokenizer_files, tmp_path_factory):
    """TRL's own trainer, whose model has the weights of ours."""
    trl = pytest.importorskip(
        "trl", reason="loss and gradients are compared with TRL's"
    )
    import datasets
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    config = small().config
    values = config.to_dict()
    rotation = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    theirs = Qwen2ForCausalLM(Qwen2Config(**values, rope_parameters=rotation))
    options = trl.GRPOConfig(
        str(tmp_path_factory.mktemp("trl")),
        beta=0.0,
        loss_type="grpo",
        num_generations=4,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        report_to="none",
        use_bias_correction_kl=False,
    )
    trainer = trl.GRPOTrainer(
        theirs,
        reward_funcs=lambda completions, **others: [0.0] * len(completions),
        args=options,
        train_dataset=datasets.Dataset.from_list([{"prompt": "?"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(tokenizer_files),
    )
    trainer.beta = 0.04  # set late, since it would fetch a reference from the hub
    trainer.current_gradient_accumulation_steps = 1
    scramble_(trainer.model).eval()
    ours = QwenForCausalLM(config)
    ours.load_state_dict(trainer.model.state_dict())
    return trainer, ours


def numbers(ours):
    """Prompts, answers of four lengths, and log-probabilities not far from theirs."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(400, (4, 9), generator=generator)
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in (2, 1, 5, 4)])
    with torch.no_grad():
        now = token_log_probs(ours, ids[:, :-1], ids[:, 1:])[:, 3:]
    old, reference = now + torch.randn(2, *now.shape, generator=generator) / 3
    advantages = torch.tensor([0.9, -0.7, 1.2, -1.4])
    return ids, mask, old, reference, advantages


def test_loss_and_gradients_are_trls(trl_trainer):
    trainer, ours = trl_trainer
    ids, mask, old, reference, advantages = numbers(ours)
    trainer.model.zero_grad()
    expected = trainer.compute_loss(
        trainer.model,
        {
            "prompt_ids": ids[:, :4],
            "prompt_mask": torch.ones_like(ids[:, :4]),
            "completion_ids": ids[:, 4:],
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "num_items_in_batch": mask.sum(),
        },
    )
    expected.backward()
    ours.zero_grad()
    log_probs = token_log_probs(ours, ids[:, :-1], ids[:, 1:])[:, 3:]
    loss = module.grpo_loss(log_probs, old, reference, advantages, mask)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, p in ours.named_parameters():
        grad = trainer.model.get_parameter(name).grad
        torch.testing.assert_close(p.grad, grad, atol=2e-4, rtol=1e-3)


def test_advantages_are_trls():
    """As GRPOTrainer computes them with scale_rewards "group"."""
    rewards = torch.tensor([1.0, 0, 0, 1, 0.5, 0.25, 2, 3, 1, 1, 1, 1])
    grouped = rewards.view(-1, 4)
    mean = grouped.mean(dim=1).repeat_interleave(4)
    std = grouped.std(dim=1).repeat_interleave(4)
    expected = (rewards - mean) / (std + 1e-4)
    torch.testing.assert_close(module.group_advantages(rewards, 4), expected)


# --- by hand


def test_advantages_by_hand():
    found = module.group_advantages(torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1]), 4)
    expected = [0.866, -0.866, -0.866, 0.866, 0, 0, 0, 0]
    assert found.tolist() == pytest.approx(expected, abs=1e-3)


def slope(new, advantage, old=-1.0, epsilon=0.2, beta=0.0, reference=-1.0):
    x = torch.tensor([[new]], requires_grad=True)
    one = torch.ones(1, 1)
    args = old * one, reference * one, torch.tensor([advantage]), one
    loss = module.grpo_loss(x, *args, epsilon, beta)
    loss.backward()
    return loss.item(), x.grad.item()


@pytest.mark.parametrize(
    "new, advantage, loss, gradient",
    [
        (-1.0, 2.0, -2.0, -2.0),  # the ratio is 1
        (-0.7, 0.87, -0.87 * 1.2, 0.0),  # it has had its share
        (-0.7, -0.87, 0.87 * math.exp(0.3), 0.87 * math.exp(0.3)),  # moved wrongly
        (-1.5, -0.87, 0.87 * 0.8, 0.0),
        (-1.5, 0.87, -0.87 * math.exp(-0.5), -0.87 * math.exp(-0.5)),
    ],
)
def test_the_clip_by_hand(new, advantage, loss, gradient):
    assert slope(new, advantage) == pytest.approx((loss, gradient), abs=1e-5)


def test_the_penalty_by_hand():
    """e^d - d - 1, of d = reference - policy."""
    loss, gradient = slope(-1.0, 0.0, beta=0.5, reference=-1.4)
    assert loss == pytest.approx(0.5 * (math.exp(-0.4) + 0.4 - 1), abs=1e-6)
    assert gradient == pytest.approx(0.5 * (1 - math.exp(-0.4)), abs=1e-6)


GROUPS = st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4)


@hypothesis_settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(GROUPS, st.floats(0.1, 5), st.floats(-5, 5))
def test_only_the_place_in_the_group_counts(group, scale, shift):
    rewards = torch.tensor(group, dtype=torch.float64)
    found = group_advantages(rewards, 4)
    assert found.sum().item() == pytest.approx(0, abs=1e-6)
    if rewards.std() > 0.1:
        moved = group_advantages(rewards * scale + shift, 4)
        torch.testing.assert_close(moved, found, atol=2e-2, rtol=2e-2)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(len(group)))
    torch.testing.assert_close(group_advantages(rewards[order], 4), found[order])


def test_what_is_masked_counts_nothing():
    generator = torch.Generator().manual_seed(0)
    new, old, reference, junk = torch.randn(4, 3, 6, generator=generator)
    mask = torch.tensor([[0.0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    advantages = torch.tensor([1.0, -1.0, 5.0])
    loss = grpo_loss(new, old, reference, advantages, mask)
    spoiled = torch.where(mask == 1, new, junk)
    assert torch.equal(grpo_loss(spoiled, old, reference, advantages, mask), loss)
    rows = [
        grpo_loss(*(x[i : i + 1] for x in (new, old, reference, advantages, mask)))
        for i in range(3)
    ]
    torch.testing.assert_close(torch.stack(rows).mean(), loss)
    assert rows[2] == 0


# --- answers


PROMPTS = [[5, 6, 7], [11], [1, 2, 3, 4, 8]]


def test_rows_hold_a_prompt_and_its_answer():
    rollouts = roll_out(small_model(), PROMPTS, 30, 6, end=0, seed=1)
    ended = 0
    for i, ids in enumerate(rollouts.answers):
        prompt = PROMPTS[i // 30]
        row, targets = rollouts.input_ids[i].tolist(), rollouts.targets[i]
        learned = targets != IGNORE_INDEX
        assert targets[learned].tolist() == ids
        assert learned.nonzero().flatten()[0] == len(prompt) - 1
        assert row[: len(prompt) + len(ids) - 1] == (prompt + ids)[:-1]
        assert 0 not in ids[:-1] and (ids[-1] == 0 or len(ids) == 6)
        ended += ids[-1] == 0
    assert 0 < ended < 90


def test_equal_prompts_are_as_a_tensor():
    model, prompts = small_model(), torch.tensor([[5, 6, 7], [1, 2, 3]])
    one = roll_out(model, prompts, 4, 6, 0, seed=2)
    other = roll_out(model, prompts.tolist(), 4, 6, 0, seed=2)
    assert one.answers == other.answers and torch.equal(one.targets, other.targets)


LONG = [[(7 * i + j) % 90 + 1 for j in range(37 + i)] for i in range(3)]  # fill pages


@pytest.mark.parametrize("prompts", [PROMPTS, LONG], ids=["rows", "pages"])
def test_what_was_drawn_has_the_probability_it_was_drawn_with(prompts, monkeypatch):
    """In the rows of the engine, and filled up on the right for learning: the same."""
    model, real = small_model(), engine_module.draw
    said = defaultdict(list)

    def spied(logits, sequences):
        ids = real(logits, sequences)
        for row, token, s in zip(logits.log_softmax(-1), ids, sequences):
            said[s.number].append(row[token].item())
        return ids

    monkeypatch.setattr(engine_module, "draw", spied)
    rollouts = roll_out(model, prompts, 4, 6, end=0, seed=3)
    log_p = token_log_probs(model, rollouts.input_ids, rollouts.targets)
    for i in range(12):
        found = log_p[i][rollouts.targets[i] != IGNORE_INDEX].tolist()
        assert found == pytest.approx(said[i], abs=1e-4)


@pytest.mark.parametrize("max_batch", [3, 8, 256])
@pytest.mark.parametrize("prompts", [PROMPTS, LONG], ids=["rows", "pages"])
def test_an_answer_is_the_same_beside_others_and_alone(prompts, max_batch):
    model = small_model()
    asked = [prompt for prompt in prompts for _ in range(4)]
    requests = answer_requests(asked, 20, seed=5)
    assert len({request.params.seed for request in requests}) == 12
    ends = dict(end=0, valid_vocab_size=12)
    engine = AnswerEngine(model, requests, 4, **ends, max_batch=max_batch)
    engine.run()
    found = [sequence.written for sequence in engine.sequences]
    assert len({len(ids) for ids in found}) > 3
    for request, ids in zip(requests, found):
        alone = AnswerEngine(model, [request], 1, **ends)
        alone.run()
        assert alone.sequences[0].written == ids
    assert roll_out(model, prompts, 4, 20, seed=5, **ends).answers == found


def test_without_a_seed_the_draws_are_pytorchs():
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn += [roll_out(small_model(), PROMPTS, 4, 9, end=0).answers]
    assert drawn[0] == drawn[1] != drawn[2]


def test_rows_that_end_are_filled_again():
    requests = answer_requests([[5, 6, 7]] * 60, 40, seed=0)
    engine = AnswerEngine(small_model(), requests, 4, 0, 12, max_batch=6)
    steps = engine.run()
    lengths = [len(sequence.written) for sequence in engine.sequences]
    assert sum(lengths) / 6 <= steps <= sum(lengths) / 6 + max(lengths)
    apart = sum(max(lengths[i : i + 6]) for i in range(0, 60, 6))
    assert steps < 0.8 * apart


@pytest.mark.parametrize("max_batch", [2, 5, 256])
def test_a_prompt_is_read_once_for_its_answers(max_batch, monkeypatch):
    """All of it that fills pages; and nobody has to give way for want of pages."""
    read, real = [], ModelRunner.read

    def counted(self, sequences, sizes):
        read.extend(sizes[s] for s in sequences)
        return real(self, sequences, sizes)

    monkeypatch.setattr(ModelRunner, "read", counted)
    monkeypatch.setattr(InOrder, "interrupt", None)
    requests = answer_requests([p for p in LONG for _ in range(4)], 20, seed=1)
    AnswerEngine(small_model(), requests, 4, end=0, max_batch=max_batch).run()
    rest = [(len(p) - 1) % PAGE_SIZE for p in LONG]
    assert sum(read) <= sum(len(p) - 1 for p in LONG) + 3 * sum(rest)


@pytest.mark.parametrize("prompts", [PROMPTS, LONG], ids=["rows", "pages"])
def test_a_model_in_training_learns_from_what_it_has_drawn(prompts):
    """Under autocast, and with adapters; its modes and weights stay as they were."""
    model = small_model().train()
    add_lora(model, 2)
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    ends = GenerationDefaults(eos_token_id=(1, 2, 3))  # of texts, not of these answers
    model.generation_config = ends
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        rollouts = roll_out(model, prompts, 4, 6, end=0, seed=1, valid_vocab_size=9)
        learned = token_log_probs(model, rollouts.input_ids, rollouts.targets)
    assert [module.training for module in model.modules()] == modes
    assert any({1, 2, 3} & {*ids[:-1]} for ids in rollouts.answers)
    learned.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_only_ids_of_the_vocabulary_are_drawn_and_asked():
    model = small_model()
    rollouts = roll_out(model, PROMPTS, 9, 6, end=0, seed=1, valid_vocab_size=5)
    assert {*sum(rollouts.answers, [])} == {0, 1, 2, 3, 4}
    for prompts, end, said in (
        ([[]], 0, "prompt must have at least one token"),
        ([[10**6]], 0, "prompt must have token ids from 0 to"),
        ([[1] * 10**5], 0, "together they exceed the context of"),
        ([[1]], 7, "eos_token_id must be a whole number from 0 to 4, not 7"),
    ):
        with pytest.raises(ValueError, match=said):
            roll_out(model, prompts, 2, 6, end, valid_vocab_size=5)


def test_weights_that_are_nan_raise_one_error_and_log_nothing(caplog):
    model = small_model()
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    model.train()
    with pytest.raises(LogitsError, match="weights or activations are nan"):
        roll_out(model, PROMPTS, 4, 6, end=0, seed=1)
    assert not caplog.records and model.training


def test_a_place_has_a_seed_of_its_own():
    seeds = {draw_seed(a, b, c) for a in range(9) for b in range(9) for c in range(9)}
    assert len(seeds) == 9**3 and all(0 <= seed < 2**63 for seed in seeds)
    assert draw_seed(1, 2, 0) == draw_seed(1, 2, 0)


# --- rewards


@pytest.mark.parametrize(
    "text, expected",
    [
        ("7", (1, 1)),
        (" 7\n", (1, 1)),
        ("It is 7.", (0, 1)),
        ("8, or 7", (0, 1)),
        ("7 or 8", (0, 0)),
        ("-7", (0, 0)),
        ("7.5", (0, 0)),
        ("7.0", (0, 1)),
        ("1,007", (0, 0)),
        ("", (0, 0)),
        ("seven", (0, 0)),
    ],
)
def test_rewards_by_name(text, expected):
    record = {"prompt": "3+4?", "answer": 7}
    assert tuple(reward(text, record) for reward in REWARDS.values()) == expected


def test_the_last_number():
    assert last_number("2,001 and -1,234.5") == -1234.5
    assert last_number("none") is None


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(
        "import math\nlength = lambda text, record: -len(text)\nno = 3\n"
        "def fails(text, record): return 1 / 0\n"
        "def says(text, record): return 'good'\n"
        "def infinite(text, record): return math.inf\n"
    )
    return tmp_path


def test_a_reward_of_the_users_own(own):
    assert load_reward("mine:length")("abc", {}) == -3
    for name, said in (
        ("best", "'best' is none of exact, number, module:function"),
        ("mine:", "is none of exact, number, module:function"),
        ("yours:f", "yours:f cannot be imported (ModuleNotFoundError: No module named"),
        ("mine:f", "mine:f cannot be imported (AttributeError"),
        ("mine:no", "mine:no is no function but 3"),
    ):
        with pytest.raises(ValueError) as caught:
            load_reward(name)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    for name, said in (
        (
            "mine:fails",
            "mine:fails failed on 'x' (ZeroDivisionError: division by zero)",
        ),
        ("mine:says", "mine:says returned 'good' for 'x', no finite number"),
        ("mine:infinite", "mine:infinite returned inf for 'x'"),
    ):
        with pytest.raises(ValueError) as caught:
            grade(load_reward(name), name, "x", {})
        assert said in str(caught.value) and "\n" not in str(caught.value)


# --- data

GOOD = {"prompt": "3+4?", "answer": "7"}


def read(record, tmp_path, **changes):
    path = tmp_path / "questions.jsonl"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    (line,) = read_lines([str(path)])
    return read_question(line, TOKENIZER, grpo_settings(**changes))


@pytest.mark.parametrize(
    "record, reason",
    [
        ("{", "not JSON"),
        ([], "not a JSON object"),
        ({"prompt": "x"}, 'no field "answer"'),
        ({"answer": "x"}, 'no field "prompt"'),
        ({**GOOD, "answer": "seven"}, '"answer" holds no number'),
        ({**GOOD, "prompt": None}, '"prompt" needs a text'),
        (
            {**GOOD, "prompt": [{"role": "user", "content": "x", "weight": 0}]},
            '"prompt": "weight" 0',
        ),
        ({**GOOD, "prompt": "y " * 99}, "more than sequence_length 128"),
    ],
)
def test_a_bad_question_says_why(record, reason, tmp_path):
    assert read(GOOD, tmp_path).record == GOOD
    with pytest.raises(ValueError, match=reason):
        read(record, tmp_path, reward="number")


def read_as(method, path, tokenizer):
    """The ids that a file's first line is read as, by one of the three methods."""
    if method == "sft":
        ((example, *_), _) = read_conversations([path], tokenizer, 128)
        return example.ids.tolist()
    reads = {
        "dpo": lambda line: [read_pair(line, tokenizer, 128).ids[0]],
        "grpo": lambda line: [read_question(line, tokenizer, grpo_settings()).prompt],
    }
    ((ids, *_), _) = read_all([path], reads[method], False, "line")
    return ids


SILENT = (
    "{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_question_is_taken_by_all_methods(
    method, text, tmp_path, tokenizer_files
):
    """A template makes tokens of it; where it makes none, there is nothing to learn."""
    path = tmp_path / "lines.jsonl"
    answers = {"completion": "7", "chosen": "7", "rejected": "8", "answer": "7"}
    path.write_text(json.dumps({"prompt": text, **answers}))
    expected = chat_ids(TOKENIZER, [{"role": "user", "content": text}])
    ids = read_as(method, str(path), TOKENIZER)
    assert ids[: len(expected)] == expected and TOKENIZER.decode(ids)
    talk = [{"role": "user", "content": text}]
    path.write_text(json.dumps({"prompt": talk, **answers}))
    assert read_as(method, str(path), TOKENIZER) == ids
    silent = HFTokenizer(tokenizer_files)
    silent.tokenizer.chat_template = SILENT.replace("m.content", "m.content.strip()")
    with pytest.raises(DataError) as caught:
        read_as(method, str(path), silent)
    said = f"{path}, line 1: the chat template makes no token of the prompt"
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    path.write_text(json.dumps({"prompt": "x", **answers}))
    assert read_as(method, str(path), silent)


# --- runs


@pytest.fixture
def questions(folder):  # noqa: F811
    """A model to begin with, and questions of unequal length."""
    lines = [{"prompt": f"{i} plus 0?", "answer": str(i)} for i in range(30)]
    Path("questions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    save_checkpoint("base", small(max_position_embeddings=200), TOKENIZER)
    return folder


def grpo_settings(**changes):
    given = settings().model_dump(exclude={"model", "tokenizer"}, exclude_unset=True)
    own = dict(format="chat", method="grpo", data=["questions.jsonl"], lora_rank=2)
    own |= dict(sequence_length=128, micro_batch_size=2, group_size=4)
    own |= dict(max_new_tokens=6, eval_sequences=4)
    return TrainConfig.create({**given, **own, **changes})


def logged(directory, name):
    return {e["step"]: e[name] for e in entries(directory) if name in e}


LETTERS = (
    "def share(text, record):\n"
    "    return sum(letter in 'aeiou' for letter in text) / (1 + len(text))\n"
)


def test_the_command_learns_and_resumes_to_the_bit(questions, capsys, monkeypatch):
    """A run of the command that is killed behind step 2, beside a whole one."""
    Path("vowels.py").write_text(LETTERS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    short = grpo_settings(updates_per_step=2, reward="vowels:share", max_new_tokens=5)
    Path("short.json").write_text(short.model_dump_json(exclude_unset=True))
    words = ["finetune", "--config", "short.json", "--init-from", "base"]
    assert main([*words, "--output-dir", "whole"]) == 0
    said = capsys.readouterr()
    assert "2 questions a step" in said.out and "held-out reward" in said.out
    assert resumed_to_the_bit()["data"] == {"position": 12}
    rewards, held_out = logged("whole", "reward"), logged("whole", "heldout_reward")
    assert rewards.keys() == set(range(1, 7)) and held_out.keys() == {3, 6}
    assert rewards == logged("killed", "reward")
    assert held_out == logged("killed", "heldout_reward")
    base = small(max_position_embeddings=200).state_dict()
    trained = final_weights("whole")
    assert all(torch.equal(trained[name], base[name]) for name in base)
    assert (Path("whole") / "adapter" / "adapter_model.safetensors").is_file()


def test_it_learns_what_is_rewarded(questions, monkeypatch):
    """Whole weights, without a reference: more vowels, step by step."""
    Path("vowels.py").write_text(LETTERS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    changes = dict(reward="vowels:share", beta=0.0, lora_rank=0, max_steps=20)
    changes |= dict(learning_rate=5e-3, eval_every=25, save_every=25)
    train(grpo_settings(**changes), init_from="base")
    rewards = [e["reward"] for e in entries("checkpoints") if "reward" in e]
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5]), rewards


def test_micro_batches_are_one_batch(questions):
    whole = dict(micro_batch_size=4, output_dir="whole")
    parts = dict(micro_batch_size=1, gradient_accumulation_steps=4, output_dir="parts")
    for changes in (whole, parts):
        train(grpo_settings(max_steps=2, **changes), init_from="base")
    assert distance(final_weights("whole"), final_weights("parts")) < 1e-4


@pytest.mark.slow
def test_processes_share_a_step(questions):
    """Each draws answers of its own; a sharded model draws and learns what a whole one
    does. Held out are three questions: the processes have not as many.
    """
    Path("vowels.py").write_text(LETTERS)
    own = dict(max_steps=3, reward="vowels:share", eval_sequences=3)
    layouts = {"ddp": {}, "fsdp": {}, "hsdp": {"shard_size": 1}}
    for parallel, size in layouts.items():
        config = grpo_settings(output_dir=parallel, parallel=parallel, **size, **own)
        Path("two.json").write_text(config.model_dump_json(exclude_unset=True))
        words = ["--config", "two.json", "--init-from", "base"]
        train_on(2, *words)
    for parallel in ("fsdp", "hsdp"):
        for name in ("reward", "heldout_reward", "answer_tokens"):
            assert logged(parallel, name) == logged("ddp", name) != {}
        assert distance(final_weights("ddp"), final_weights(parallel)) < 1e-4


def test_what_does_not_fit_the_method_is_refused_before_anything_is_read(
    questions, capsys
):
    grpo = ["finetune", "--method", "grpo", "--data", "questions.jsonl"]
    grpo += ["--init-from", "not_there"]
    for flags, said in (
        (["--z-loss", "0.1"], "z_loss: method grpo has no use for it, only sft"),
        (["--reward", "best"], "reward: 'best' is none of exact, number, module:fun"),
        (["--group-size", "1"], "--group-size: Input should be greater than or equal"),
        (["--max-new-tokens", "512"], "max_new_tokens 512 leaves no room for a prompt"),
    ):
        assert said in refused(capsys, *grpo, *flags)
    sft = ["finetune", "--data", "questions.jsonl", "--init-from", "not_there"]
    for flags in (
        ["--reward", "number"],
        ["--group-size", "4"],
        ["--max-new-tokens", "9"],
        ["--updates-per-step", "2"],
        ["--clip", "0.1"],
    ):
        name = flags[0].removeprefix("--").replace("-", "_")
        said = f"{name}: method sft has no use for it, only grpo"
        assert said in refused(capsys, *sft, *flags)
    with pytest.raises(DataError, match='each line {"prompt", "answer"}'):
        train(grpo_settings(data=[]), init_from="base")


def test_a_reward_that_fails_ends_the_run_with_a_line(questions, capsys, monkeypatch):
    Path("bad.py").write_text("def f(text, record): return None\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("bad.json").write_text(
        grpo_settings(reward="bad:f").model_dump_json(exclude_unset=True)
    )
    assert main(["finetune", "--config", "bad.json", "--init-from", "base"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("qwen-analog: error: reward: bad:f returned None for")
    assert "no finite number" in said


# --- mutants


def not_clipped(new, old, reference, advantages, mask, epsilon=0.2, beta=0.04):
    return grpo_loss(new, old, reference, advantages, mask, 1e9, beta)


def both_ends_clipped(new, old, reference, advantages, mask, epsilon=0.2, beta=0.04):
    ratio = (new - old).exp().clamp(1 - epsilon, 1 + epsilon).log() + old
    near = grpo_loss(ratio, old, reference, advantages, mask, epsilon, 0.0)
    far = grpo_loss(new, old, reference, advantages * 0, mask, epsilon, beta)
    return near + far


def other_penalty(new, old, reference, advantages, mask, epsilon=0.2, beta=0.04):
    return grpo_loss(new, old, 2 * new.detach() - reference, advantages, mask)


def mean_over_all_tokens(new, old, reference, advantages, mask, *others):
    rows = [
        grpo_loss(*(x[i : i + 1] for x in (new, old, reference, advantages, mask)))
        for i in range(len(mask))
    ]
    share = mask.sum(1) / mask.sum()
    return (torch.stack(rows) * share).sum()


def without_mask(new, old, reference, advantages, mask, *others):
    return grpo_loss(new, old, reference, advantages, torch.ones_like(mask), *others)


LOSSES = {
    "nothing is clipped": not_clipped,
    "the clip has no min": both_ends_clipped,
    "the penalty is reversed": other_penalty,
    "a mean over all tokens": mean_over_all_tokens,
    "filling counts": without_mask,
}


@pytest.mark.mutant
@pytest.mark.parametrize("name", LOSSES)
def test_another_loss_is_noticed(name, monkeypatch, trl_trainer):
    monkeypatch.setattr(module, "grpo_loss", LOSSES[name])
    with pytest.raises(AssertionError):
        test_loss_and_gradients_are_trls(trl_trainer)


def of_all(rewards, group_size):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def not_scaled(rewards, group_size):
    groups = rewards.view(-1, group_size)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def neighbours_apart(rewards, group_size):
    groups = rewards.view(group_size, -1).T.flatten()
    return group_advantages(groups, group_size)


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", [of_all, not_scaled, neighbours_apart])
def test_other_advantages_are_noticed(mutant, monkeypatch):
    monkeypatch.setattr(module, "group_advantages", mutant)
    with pytest.raises(AssertionError):
        test_advantages_are_trls()


@pytest.mark.mutant
def test_draws_without_a_seed_are_noticed(questions, capsys, monkeypatch):
    """Were they the process's own, a resumed run would draw others."""
    draws = iter(range(1000))
    monkeypatch.setattr(module, "draw_seed", lambda *place: next(draws))
    with pytest.raises(AssertionError):
        test_the_command_learns_and_resumes_to_the_bit(questions, capsys, monkeypatch)


@pytest.mark.mutant
def test_rewards_that_are_turned_round_are_noticed(questions, monkeypatch):
    turned = lambda rewards, size: -group_advantages(rewards, size)
    monkeypatch.setattr(module, "group_advantages", turned)
    with pytest.raises(AssertionError):
        test_it_learns_what_is_rewarded(questions, monkeypatch)
