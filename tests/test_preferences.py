"""Learning from pairs of answers, beside TRL; runs that are killed."""

import contextlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from book import scramble_
from helpers import refused, small_model
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from training import (  # noqa: F401
    distance,
    entries,
    final_weights,
    folder,
    read_the_same,
    resumed_to_the_bit,
    same,
    settings,
    train_on,
    training_state,
)
from weights_helpers import TOKENIZER, small

from qwen_analog import QwenForCausalLM
from qwen_analog import preferences as module
from qwen_analog.archive import CheckpointError
from qwen_analog.checkpoint import load_model, save_checkpoint
from qwen_analog.cli import main
from qwen_analog.distributed import DistributedContext
from qwen_analog.hf_tokenizer import HFTokenizer
from qwen_analog.jsonl import DataError, read_lines
from qwen_analog.lora import add_lora, load_lora, lora_disabled, lora_layers
from qwen_analog.loss import IGNORE_INDEX
from qwen_analog.preferences import (
    ExampleDataset,
    Pair,
    dpo_loss,
    encode_pair,
    example_datasets,
    pair_batch,
    pair_scores,
    preference_loss,
    read_pair,
    sequence_log_probs,
    token_log_probs,
    with_prompt,
)
from qwen_analog.train import train
from qwen_analog.train_config import TrainConfig

pytest_plugins = ["weights_helpers"]

PAIRS = [([5, 6, 7], [8, 9], [10]), ([11], [12], [13, 14, 15, 16]), ([1, 2], [3], [4])]


def adapted(std=0.1):
    model = add_lora(small_model(), 4, 8)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=std)
    return model


# --- beside TRL


def conversation(*turns):
    roles = "user", "assistant"
    return [
        {"role": roles[i % 2], "content": content} for i, content in enumerate(turns)
    ]


TALKS = [
    dict(
        prompt=conversation("Hi"),
        chosen=conversation("", "Hello!")[1:],
        rejected=conversation("", "No.")[1:],
    ),
    dict(
        prompt=conversation("1?", "one", "2?"),
        chosen=conversation("", "two, as you know")[1:],
        rejected=conversation("", "three?")[1:],
    ),
]


@pytest.fixture(scope="module")
def trl_trainer(tokenizer_files, tmp_path_factory):
    """TRL's own trainer, with its model, its batch of TALKS, and our tokenizer."""
    reason = "loss and gradients are compared with TRL's"
    trl = pytest.importorskip("trl", reason=reason)
    peft = pytest.importorskip("peft", reason=reason)
    import datasets
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = small(max_position_embeddings=200).config
    values = config.to_dict()
    rotation = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    theirs = Qwen2ForCausalLM(Qwen2Config(**values, rope_parameters=rotation))
    tokenizer = HFTokenizer(tokenizer_files)
    options = trl.DPOConfig(
        str(tmp_path_factory.mktemp("trl")),
        beta=0.5,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    targets = ["q_proj", "down_proj"]
    trainer = trl.DPOTrainer(
        theirs,
        args=options,
        train_dataset=datasets.Dataset.from_list(TALKS),
        processing_class=tokenizer.tokenizer,
        peft_config=peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets),
    )
    theirs = scramble_(trainer.model).eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    ours = add_lora(QwenForCausalLM(config), 2, 4, targets)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(theirs.get_parameter(peft_name(name, targets)))
    return trainer, batch, ours, tokenizer


def peft_name(name, targets):
    layer, _, kind = name.rpartition(".")
    if layer.rpartition(".")[2] in targets:
        kind = f"{kind}.default.weight" if "lora" in kind else f"base_layer.{kind}"
    return f"base_model.model.{layer}.{kind}"


def test_batch_loss_and_gradients_are_trls(trl_trainer):
    trainer, theirs, model, tokenizer = trl_trainer
    ours = pair_batch([encode_pair(talk, tokenizer) for talk in TALKS])
    check_batch(ours, theirs)
    trainer.model.zero_grad()
    expected = trainer.compute_loss(trainer.model, theirs)
    expected.backward()
    model.zero_grad()
    loss = preference_loss(model, *ours, beta=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    learned = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert len(learned) == 2 * 2 * 3
    for name, p in learned:
        name = peft_name(name, ["q_proj", "down_proj"])
        grad = trainer.model.get_parameter(name).grad
        torch.testing.assert_close(p.grad, grad, atol=2e-4, rtol=1e-3)


def check_batch(ours, theirs):
    """The same tokens, of which the same are learned, filling apart."""
    input_ids, targets = ours
    real, learned = theirs["attention_mask"][:, 1:], theirs["completion_mask"][:, 1:]
    ids = theirs["input_ids"]
    assert torch.equal(input_ids * real, ids[:, :-1] * real)
    labels = ids[:, 1:].masked_fill(learned == 0, IGNORE_INDEX)
    assert torch.equal(targets, labels)


def test_the_scores_are_trls(trl_trainer):
    trainer, theirs, model, tokenizer = trl_trainer
    batch = pair_batch([encode_pair(talk, tokenizer) for talk in TALKS])
    with torch.no_grad():
        now = sequence_log_probs(model, *batch)
        with lora_disabled(model):
            before = sequence_log_probs(model, *batch)
    four = torch.stack([*now.chunk(2), *before.chunk(2)])
    config, alone = dpo_settings(beta=0.5), DistributedContext()
    scores = pair_scores(four, config, alone)
    trainer._metrics["train"].clear()
    trainer.compute_loss(trainer.model.train(), theirs)
    said = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    names = {
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen_log_prob": "logps/chosen",
        "rejected_log_prob": "logps/rejected",
    }
    for ours, name in names.items():
        assert scores[ours] == pytest.approx(said[name], abs=1e-4), name
    assert scores["loss"] == pytest.approx(dpo_loss(*four, beta=0.5).item())


# --- by hand


def test_four_numbers_by_hand():
    four = [torch.tensor([x]) for x in (-1.2, -0.8, -1.4, -0.7)]
    assert dpo_loss(*four, beta=0.5).item() == pytest.approx(
        -math.log(1 / (1 + math.exp(-0.15))), abs=1e-6
    )
    half = torch.tensor([[-1.2, -3.0], [-0.8, -1.0], [-1.4, -1.0], [-0.7, -1.0]])
    scores = pair_scores(half, dpo_settings(beta=0.5), DistributedContext())
    assert scores["margin"] == pytest.approx((0.15 - 1.0) / 2, abs=1e-6)
    assert scores["accuracy"] == 0.5
    assert scores["chosen_log_prob"] == pytest.approx(-2.1)
    assert scores["rejected_log_prob"] == pytest.approx(-0.9)


NUMBERS = st.lists(st.floats(-50, 0, width=32), min_size=4, max_size=4)


@hypothesis_settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(NUMBERS, st.floats(0.01, 2), st.floats(-20, 20, width=32))
def test_the_loss_knows_differences_only(numbers, beta, shift):
    """The same change of policy and reference changes nothing; what is exchanged
    between both answers adds up to probability 1.
    """
    four = [torch.tensor([x], dtype=torch.float64) for x in numbers]
    chosen, rejected, *before = four
    loss = dpo_loss(*four, beta=beta).item()
    moved = chosen + shift, rejected, before[0] + shift, before[1]
    assert dpo_loss(*moved, beta=beta).item() == pytest.approx(loss, abs=1e-4)
    swapped = dpo_loss(rejected, chosen, *before[::-1], beta=beta).item()
    assert math.exp(-loss) + math.exp(-swapped) == pytest.approx(1, abs=1e-6)


def test_rows_are_what_they_are_alone():
    """Filling, other rows and other answers change no row's log-probability."""
    model = adapted()
    together = sequence_log_probs(model, *pair_batch(PAIRS, pad_id=17)).detach()
    rows = [(p, c) for p, c, _ in PAIRS] + [(p, r) for p, _, r in PAIRS]
    for value, (prompt, answer) in zip(together, rows):
        ids = torch.tensor([prompt + answer])
        log_p = model(ids[:, :-1]).log_softmax(-1)[0]
        alone = sum(log_p[len(prompt) - 1 + i, t] for i, t in enumerate(answer))
        torch.testing.assert_close(value, alone.detach(), atol=1e-4, rtol=1e-5)


def test_the_reference_is_the_model_without_adapters():
    model, plain = adapted(), small_model()
    batch = pair_batch(PAIRS)
    with torch.no_grad():
        before = sequence_log_probs(plain, *batch).chunk(2)
        now = sequence_log_probs(model, *batch).chunk(2)
    loss = preference_loss(model, *batch, beta=0.3)
    assert loss.item() == pytest.approx(
        dpo_loss(*now, *before, beta=0.3).item(), abs=1e-5
    )
    fresh = preference_loss(add_lora(small_model(), 4, 8), *batch)
    assert fresh.item() == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None}
    assert learned and all("lora" in name for name in learned)


# --- data


def line(record, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    (found,) = read_lines([str(path)])
    return found


ANSWER = {"role": "assistant", "content": "x"}
GOOD = {"prompt": "3+4?", "chosen": "7", "rejected": "07"}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"prompt": 3}, '"prompt" needs a text'),
        ({"chosen": " "}, '"chosen" needs a text'),
        ({"prompt": []}, '"prompt" must end with a message of the user'),
        ({"chosen": None}, '"chosen" needs a text'),
        ({"rejected": "7"}, "both answers are the same"),
        ({"chosen": conversation("a")}, '"chosen" must end with a message of the as'),
        ({"prompt": conversation("a", "b")}, '"prompt" must end with a message of the'),
        (
            {"chosen": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
            "tool",
        ),
        ({"prompt": [{"role": "robot", "content": "x"}, *conversation("a")]}, "a role"),
        ({"chosen": [ANSWER | {"weight": 0}]}, '"chosen": "weight" 0 is not supported'),
        (
            {"rejected": [ANSWER | {"reasoning_content": "z"}]},
            '"rejected": "reasoning_',
        ),
        ({"prompt": [ANSWER | {"name": "x"}, *conversation("a")]}, '"prompt": "name"'),
        ({"chat_template_kwargs": {"think": 1}}, "kwargs. are not supported"),
        ({"chosen": "\ud800"}, "half a surrogate pair"),
        ({"chosen": "y " * 99}, "more than sequence_length 110"),
        ({"chosen": "y" * 200_000}, "more than sequence_length 110"),
        ({"chosen": "y" * 2**20}, "longer than a sequence"),
    ],
)
def test_a_bad_pair_says_why(change, reason, tmp_path):
    read_pair(line(GOOD, tmp_path), TOKENIZER, 110)
    with pytest.raises(ValueError, match=reason):
        read_pair(line(GOOD | change, tmp_path), TOKENIZER, 110)


def test_missing_fields_and_other_values_are_refused(tmp_path):
    for name in GOOD:
        record = {k: v for k, v in GOOD.items() if k != name}
        with pytest.raises(ValueError, match=f'no field "{name}"'):
            read_pair(line(record, tmp_path), TOKENIZER, 110)
    for text in ("{", "[]", "3"):
        with pytest.raises(ValueError):
            read_pair(line(text, tmp_path), TOKENIZER, 110)


def test_plain_and_conversational_pairs_are_one(tmp_path):
    talk = {
        "prompt": conversation("3+4?"),
        "chosen": conversation("", "7")[1:],
        "rejected": conversation("", "07")[1:],
    }
    plain, said = (read_pair(line(x, tmp_path), TOKENIZER, 110) for x in (GOOD, talk))
    assert plain.ids == said.ids and plain.content() == said.content()
    noted = [ANSWER | {"content": "7", "weight": 1, "reasoning_content": None}]
    again = read_pair(line(GOOD | {"chosen": noted}, tmp_path), TOKENIZER, 110)
    assert again.ids == plain.ids
    silent = [{"role": "system", "content": ""}, *talk["prompt"]]
    asked, *_ = encode_pair({**GOOD, "prompt": silent}, TOKENIZER)
    assert TOKENIZER.decode(asked).startswith("<|im_start|>system\n<|im_end|>")


def test_a_prompt_that_both_answers_repeat_is_taken_out(tmp_path):
    whole = [{n: t["prompt"] + t[n] for n in ("chosen", "rejected")} for t in TALKS]
    for record, talk in zip(whole, TALKS):
        found, told = (
            read_pair(line(x, tmp_path), TOKENIZER, 200) for x in (record, talk)
        )
        assert (found.ids, found.key) == (told.ids, told.key)
        assert with_prompt(record) == talk
    trl = pytest.importorskip("trl", reason="prompts are compared with TRL's")
    assert [trl.extract_prompt(record) for record in whole] == TALKS
    same = {"chosen": whole[0]["chosen"], "rejected": whole[0]["chosen"]}
    with pytest.raises(ValueError, match="both answers are the same"):
        read_pair(line(same, tmp_path), TOKENIZER, 200)
    other = {"chosen": conversation("a", "b"), "rejected": conversation("c", "d")}
    with pytest.raises(ValueError, match='"prompt" must end with a message of the us'):
        read_pair(line(other, tmp_path), TOKENIZER, 200)


def test_each_epoch_has_every_example_once_and_a_place_is_kept():
    pairs = [Pair(([i], [1], [2]), 1, str(i // 2), f"a:{i}") for i in range(20)]
    data, held = example_datasets(pairs, seed=1, fraction=0.3)
    assert held and len(data.examples) + len(held.examples) == 20
    assert not {p.key for p in data.examples} & {p.key for p in held.examples}
    assert data.fingerprint == held.fingerprint
    other = [*pairs[:-1], Pair(([9], [1], [3]), 1, "9", "a:19")]
    assert example_datasets(other, 1, 0.3)[0].fingerprint != data.fingerprint
    n = len(data.examples)
    epochs = [[p.source for p in data.take(n)] for _ in range(3)]
    assert all(sorted(e) == sorted(p.source for p in data.examples) for e in epochs)
    assert epochs[0] != epochs[1]
    again = ExampleDataset(data.examples, seed=1)
    again.load_state_dict({"position": n - 1})
    assert [p.source for p in again.take(3)] == [epochs[0][-1], *epochs[1][:2]]
    shares = [ExampleDataset(data.examples, seed=1).take(2, r, 2) for r in range(2)]
    assert [p.source for pair in zip(*shares) for p in pair] == epochs[0][:4]


# --- runs


@pytest.fixture
def pairs(folder):  # noqa: F811
    """A model to begin with, and pairs of unequal length."""
    lines = [
        {"prompt": f"{i}?", "chosen": f"{i}!" * (1 + i % 3), "rejected": f"0{i}!"}
        for i in range(40)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    save_checkpoint("base", small(max_position_embeddings=200), TOKENIZER)
    return folder


def dpo_settings(**changes):
    given = settings().model_dump(exclude={"model", "tokenizer"}, exclude_unset=True)
    own = dict(format="chat", method="dpo", data=["pairs.jsonl"], sequence_length=128)
    return TrainConfig.create({**given, **own, "lora_rank": 2, **changes})


def test_the_command_learns_and_resumes_to_the_bit(pairs, capsys):
    """A run of the command that is killed behind step 2, beside a whole one."""
    Path("small.json").write_text(
        settings().model_dump_json(include={*SMALL_RUN}, exclude_unset=True)
    )
    words = ["finetune", "--method", "dpo", "--data", "pairs.jsonl", "--beta", "0.3"]
    words += ["--config", "small.json", "--init-from", "base"]
    words += ["--output-dir", "whole", "--sequence-length", "128"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "4 pairs a step" in said.out and "accuracy 1.000" in said.out
    assert resumed_to_the_bit()["data"] == {"position": 24}

    lines = entries("whole")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    first, last = (e for e in lines if "heldout_loss" in e)
    names = "loss", "accuracy", "margin", "chosen_log_prob", "rejected_log_prob"
    assert all(math.isfinite(last[f"heldout_{name}"]) for name in names)
    assert last["heldout_loss"] < first["heldout_loss"] < math.log(2)
    assert last["heldout_margin"] > first["heldout_margin"] > 0
    resumed_lines = {e["step"]: e for e in entries("killed") if "heldout_loss" in e}
    assert resumed_lines[6]["heldout_margin"] == last["heldout_margin"]

    base, _ = load_model("base")
    before, merged = base.state_dict(), load_model("whole/final")[0]
    trained = final_weights("whole")
    assert all(torch.equal(trained[name], before[name]) for name in before)  # frozen
    ids = torch.arange(12)[None]
    load_lora(base, "whole/adapter")
    torch.testing.assert_close(base(ids), merged(ids), rtol=1e-4, atol=1e-4)
    files = load_file("whole/adapter/adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in files)


SMALL_RUN = "max_steps warmup_steps learning_rate save_every eval_every log_every"
SMALL_RUN = (*SMALL_RUN.split(), "keep_last", "precision", "heldout_fraction")


def test_without_adapters_a_frozen_copy_is_the_reference(pairs):
    """The run resumes to the bit: its copy is that of the first weights, not of the
    checkpoint's. A run elsewhere takes it along.
    """
    config = dpo_settings(lora_rank=0, output_dir="whole", learning_rate=1e-3)
    train(config, init_from="base")
    losses = [entry["loss"] for entry in entries("whole") if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < math.log(2) - 0.01
    base, kept = (load_model(name)[0] for name in ("base", "whole/reference"))
    ids = torch.arange(12)[None]
    assert torch.equal(kept(ids), base(ids))
    assert not torch.equal(load_model("whole/final")[0](ids), base(ids))
    assert resumed_to_the_bit()["data"] == {"position": 24}
    train(config.model_copy(update={"output_dir": "other"}), "whole/step_4")
    whole, other = training_state("whole/final"), training_state("other/final")
    assert same(whole["model_state_dict"], other["model_state_dict"])
    assert torch.equal(load_model("other/reference")[0](ids), base(ids))
    shutil.rmtree("whole/reference")
    with pytest.raises(CheckpointError, match="reference is not there: a run without"):
        train(config.model_copy(update={"output_dir": "third"}), "whole/step_4")
    with pytest.raises(ValueError, match="needs a model that has learned to answer"):
        train(dpo_settings(lora_rank=0, output_dir="fourth"))


def test_micro_batches_are_one_batch(pairs):
    """The loss is a mean over pairs, however they are spread."""
    whole = dict(micro_batch_size=4, output_dir="whole")
    parts = dict(micro_batch_size=1, gradient_accumulation_steps=4, output_dir="parts")
    for changes in (whole, parts):
        train(dpo_settings(max_steps=3, **changes), init_from="base")
    assert distance(final_weights("whole"), final_weights("parts")) < 1e-4


@pytest.mark.parametrize(
    "parallel, rank",
    [
        ("ddp", 2),
        pytest.param("fsdp", 2, marks=pytest.mark.slow),
        pytest.param("fsdp", 0, marks=pytest.mark.slow),
    ],
)
def test_processes_share_a_step(parallel, rank, pairs):
    own = dict(eval_sequences=3, lora_rank=rank)
    train(dpo_settings(output_dir="one", **own), init_from="base")
    config = dpo_settings(
        output_dir="two", parallel=parallel, micro_batch_size=2, **own
    )
    Path("two.json").write_text(config.model_dump_json(exclude_unset=True))
    words = ["--config", "two.json", "--init-from", "base"]
    train_on(2, *words)
    assert distance(final_weights("one"), final_weights("two")) < 1e-4
    one, two = (
        [e["heldout_margin"] for e in entries(name) if "heldout_margin" in e]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, abs=1e-3)


def test_what_does_not_fit_the_method_is_refused_before_anything_is_read(pairs, capsys):
    dpo = ["finetune", "--method", "dpo", "--data", "pairs.jsonl"]
    dpo += ["--init-from", "not_there"]
    for flags, said in (
        (["--z-loss", "0.1"], "z_loss: method dpo has no use for it, only sft"),
        (["--beta", "0"], "beta: must be above 0 with method dpo"),
        (["--beta", "-1"], "beta: Input should be greater than or equal to 0"),
    ):
        assert said in refused(capsys, *dpo, *flags)
    sft = ["finetune", "--data", "pairs.jsonl", "--init-from", "not_there"]
    assert "beta: method sft has no use for it" in refused(capsys, *sft, "--beta", "1")
    texts = dpo_settings(format="text")
    with pytest.raises(ValueError, match="format: method dpo learns from answers"):
        train(texts, init_from="not_there")
    with pytest.raises(DataError, match='each line {"prompt", "chosen", "rejected"}'):
        train(dpo_settings(data=[]), init_from="base")
    train(dpo_settings(max_steps=2), init_from="base")
    with pytest.raises(CheckpointError, match="another method"):
        changes = dict(method="sft", output_dir="other", max_steps=4)
        train(dpo_settings(**changes), "checkpoints/final", from_checkpoint=True)


def test_bad_lines_of_a_run(pairs, capsys):
    with open("pairs.jsonl", "a") as file:
        file.write('{"prompt": "x"}\n')
    with pytest.raises(DataError, match='line 41: no field "chosen"'):
        train(dpo_settings(max_steps=2), init_from="base")
    train(dpo_settings(max_steps=2, skip_bad_lines=True), init_from="base")
    assert "skipped 1 bad lines" in capsys.readouterr().err
    Path("pairs.jsonl").write_text("")
    with pytest.raises(DataError, match="no pair in"):
        train(dpo_settings(output_dir="other"), init_from="base")


# --- mutants


def forgets_reference(a, b, c, d, beta=0.1):
    return dpo_loss(a, b, torch.zeros_like(c), torch.zeros_like(d), beta)


def exchanged(a, b, c, d, beta=0.1):
    return dpo_loss(b, a, d, c, beta)


def without_beta(a, b, c, d, beta=0.1):
    return dpo_loss(a, b, c, d, 1.0)


def learns_the_prompt(model, input_ids, targets):
    return token_log_probs(model, input_ids, targets.roll(1, 1)).sum(1)


def mean_of_tokens(model, input_ids, targets):
    count = (targets != IGNORE_INDEX).sum(1)
    return token_log_probs(model, input_ids, targets).sum(1) / count


@contextlib.contextmanager
def stays_on(model):
    yield


MUTANTS = {
    "the reference is forgotten": ("dpo_loss", forgets_reference),
    "the answers are exchanged": ("dpo_loss", exchanged),
    "beta is left out": ("dpo_loss", without_beta),
    "targets are moved": ("sequence_log_probs", learns_the_prompt),
    "a mean over tokens": ("sequence_log_probs", mean_of_tokens),
    "the adapter stays on": ("lora_disabled", stays_on),
}


@pytest.mark.mutant
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, monkeypatch, trl_trainer):
    monkeypatch.setattr(module, *MUTANTS[name])
    with pytest.raises(AssertionError):
        test_batch_loss_and_gradients_are_trls(trl_trainer)


def sum_of_micro_batches(model, batch, config, device):
    four = module.pair_log_probs(model, batch, config, device)
    return dpo_loss(*four, beta=config.beta)


@pytest.mark.mutant
def test_a_mean_of_each_micro_batch_is_noticed(pairs, monkeypatch):
    monkeypatch.setattr(module, "summed_pair_loss", sum_of_micro_batches)
    with pytest.raises(AssertionError):
        test_micro_batches_are_one_batch(pairs)
