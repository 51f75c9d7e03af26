"""Broken generators: each edit of `generate.py` must be noticed by the test that is
named beside it.
"""

import types
from itertools import product

import pytest
import test_generate as samplers
import test_generate_text as texts
import torch

from qwen_analog import QwenForCausalLM, generate as module

SOURCE = open(module.__file__, encoding="utf-8").read()
ALONE, ENDS = (
    samplers.test_each_row_of_a_ragged_batch_is_that_row_alone,
    samplers.test_rows_of_a_ragged_batch_end_and_are_filled_up,
)


def the_same_filters():
    dice = torch.Generator().manual_seed(0)
    for logits in (
        4 * torch.randn(32, 90, generator=dice),
        (4 * torch.randn(32, 90, generator=dice)).round() / 2,
    ):
        for temperature, top_k, top_p, min_p in product(
            (0.4, 1.0), (None, 1, 7), (None, 1e-9, 0.3, 0.9), (None, 0.05, 1.0)
        ):
            options = dict(
                temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
            )
            assert torch.equal(
                samplers.filter_logits(logits, **options),
                samplers.warpers(**options)(None, logits),
            ), options


def the_same_penalty():
    dice = torch.Generator().manual_seed(0)
    logits, ids = (
        torch.randn(8, 30, generator=dice),
        torch.randint(30, (8, 12), generator=dice),
    )
    assert torch.equal(
        samplers.penalize_repetition(logits, ids, 1.7),
        samplers.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone()),
    )
    mask = (torch.arange(12) > 5).expand(8, 12)
    assert torch.equal(
        samplers.penalize_repetition(logits, ids, 1.7, mask),
        samplers.penalize_repetition(logits, ids[:, 6:], 1.7),
    )


def sixteen_bits():
    """Rounding changes few draws: many rows."""
    model, ids, dice = (
        samplers.model_of(torch.bfloat16),
        samplers.prompt(4000, 2),
        torch.Generator().manual_seed(5),
    )
    with torch.no_grad():
        scores = samplers.warpers(**samplers.MIXED)(
            ids, model(ids, logits_to_keep=1)[:, -1].float()
        )
    expected = torch.multinomial(scores.softmax(-1), 1, generator=dice)
    assert torch.equal(
        model.generate(ids, 1, seed=5, use_cache=False, **samplers.MIXED)[:, 2:],
        expected,
    )


def stops():
    for tokens, stop, expected in (
        (["one E", "N", "D two"], "END", "one "),
        (["one E", "N"], "END", "one EN"),
        (["aba"], ["aba", "b"], "a"),
        (["ab", "ab", "c"], ["abc"], "ab"),
        (["a", "b"], ["c"], "ab"),
        (["xaab"], ["ab", "aab"], "x"),
    ):
        shown, _ = texts.pieces(texts.Characters(1), tokens, stop)
        assert "".join(shown) == expected, (tokens, stop, shown)
    assert texts.pieces(texts.Characters(1), ["ab", "c", "d"], ["cxyz"])[0] == [
        "ab",
        "",
        "cd",
        "",
    ]


MUTANTS = {
    "temperature multiplied": (
        "logits / temperature",
        "logits * temperature",
        the_same_filters,
    ),
    "top-k drops the k-th": ("logits < kth", "logits <= kth", the_same_filters),
    "top-p drops the crossing token": (
        "cumsum(-1) <= 1 - top_p",
        "cumsum(-1) - ascending.softmax(-1) < 1 - top_p",
        the_same_filters,
    ),
    "top-p may keep nothing": ("removed[..., -1] = False", "pass", the_same_filters),
    "top-p in sorted order": (
        "removed.scatter(-1, order, removed)",
        "removed",
        the_same_filters,
    ),
    "min-p relative to 1": (
        "min_p * p.amax(-1, keepdim=True)",
        "min_p",
        the_same_filters,
    ),
    "min-p drops its bound": ("p < min_p", "p <= min_p", the_same_filters),
    "penalty divides negative logits": (
        "torch.where(logits < 0, logits * penalty, logits / penalty)",
        "(logits / penalty)",
        the_same_penalty,
    ),
    "penalty applied to padding": (
        "ids = ids.masked_fill(attention_mask == 0, V)",
        "pass",
        the_same_penalty,
    ),
    "penalty forgets the prompt's padding": (
        (
            "counts = None if padding is None else torch.arange(end, device=device) >="
            " padding[:, None]"
        ),
        "counts = None",
        ALONE,
        "plain",
        dict(repetition_penalty=1.3),
    ),
    "positions not shifted for padding": (
        "(queries - padding)[..., 0]",
        "(queries + 0 * padding)[..., 0]",
        samplers.test_positions_count_from_each_rows_own_beginning,
        True,
    ),
    "padding visible": (
        "((keys >= padding) | (keys == queries))",
        "(keys >= 0 * padding)",
        ALONE,
        "plain",
        {},
    ),
    "padding sees nothing": (
        "((keys >= padding) | (keys == queries))",
        "(keys >= padding)",
        samplers.test_every_token_sees_something,
    ),
    "padding on the right": (
        "[[pad_id] * (T - len(row)) + list(row)",
        "[list(row) + [pad_id] * (T - len(row))",
        samplers.test_pad_left,
    ),
    "draws in the model's dtype": (
        "logits[:, -1].float()",
        "logits[:, -1]",
        sixteen_bits,
    ),
    "uncached reads the last token only": (
        "if use_cache else 0",
        "if use_cache else end - 1",
        samplers.test_draws_equal_a_loop_over_hugging_face_warpers,
        torch.float64,
    ),
    "logits of the first position": (
        ", logits_to_keep=1)\n            logits = logits[:, -1]",
        ")\n            logits = logits[:, 0]",
        samplers.test_greedy_equals_hugging_face,
        "plain",
        9,
    ),
    "the seed starts again at each step": (
        "            start = cache",
        (
            "            generator = generator and generator.manual_seed(seed)\n       "
            "     start = cache"
        ),
        samplers.test_draws_equal_hugging_face_logits_and_warpers,
    ),
    "the seed goes to the global dice": (
        "torch.Generator(device).manual_seed(seed)",
        "torch.manual_seed(seed)",
        samplers.test_the_seed_repeats_and_touches_nothing_else,
        "cpu",
    ),
    "samples of rows mixed up": (
        "x.repeat_interleave(copies, dim=1) for x in (cache",
        "x.repeat(1, copies, 1, 1, 1) for x in (cache",
        samplers.test_samples_of_a_row_stand_together_and_read_the_prompt_once,
    ),
    "log-probabilities after the penalty": (
        "-F.cross_entropy(logits, new",
        (
            "-F.cross_entropy(penalize_repetition(logits, tokens[:, :end],"
            " repetition_penalty), new"
        ),
        samplers.test_log_probabilities_are_those_of_a_plain_forward,
        dict(seed=1, repetition_penalty=1.5),
    ),
    "filling has log-probabilities": (
        "logprobs.masked_fill(finished, 0.0)",
        "logprobs",
        samplers.test_log_probabilities_are_those_of_a_plain_forward,
        dict(temperature=0),
    ),
    "only the first end token counts": (
        "torch.isin(new, stop_ids)",
        "new == eos_ids[0]",
        samplers.test_rows_end_are_filled_up_and_stop_together,
        dict(temperature=0),
        True,
    ),
    "ended rows are not filled": (
        "torch.where(finished, eos_ids[0], new)",
        "new",
        ENDS,
    ),
    "stops with the first row": ("finished.all()", "finished.any()", ENDS),
    "a padding row may win": (
        ":valid_vocab_size]",
        ":]",
        samplers.test_padding_rows_are_never_chosen,
        dict(temperature=0),
        True,
    ),
    "stays in eval mode": (
        "module.training = True",
        "pass",
        samplers.test_every_module_gets_its_mode_back,
        None,
    ),
    "keeps the graph": (
        "    @torch.no_grad()\n",
        "",
        samplers.test_cached_logits_and_the_work_of_a_step,
    ),
    "broken bytes wait for ever": (
        "open_end = min(3, ",
        "open_end = min(999, ",
        texts.test_broken_bytes_do_not_wait_for_ever,
    ),
    "stop strings are shown": (
        "len(self._waiting) - complete)",
        "len(self._waiting))",
        stops,
    ),
    "half stop strings are shown": (
        "len(self._waiting) - self._finder.begun",
        "len(self._waiting)",
        stops,
    ),
    "more is held back than needed": (
        "self._finder.begun)",
        "max(map(len, self.stop), default=0))",
        stops,
    ),
    "what was held back is lost": (
        "return piece + self._take",
        "return piece + 0 * self._take",
        stops,
    ),
    "a stop string in another's beginning is missed": (
        "self._complete[new] or self._complete[child]",
        "self._complete[new]",
        stops,
    ),
    "the shorter of two stop strings counts": (
        "self._complete[new] or self._complete[child]",
        "self._complete[child] or self._complete[new]",
        stops,
    ),
    "a quotient that overflows": (
        "torch.where(divided.amax(-1, keepdim=True).isfinite(), divided, moved)",
        "divided",
        samplers.test_every_legal_setting_draws_from_finite_logits,
        dict(temperature=1e-40),
    ),
    "a penalised logit that overflows": (
        ".clamp(number.min, number.max)",
        "",
        samplers.test_every_legal_setting_draws_from_finite_logits,
        dict(repetition_penalty=1e-300),
    ),
    "rows without a choice are drawn from": (
        "if not good.all():",
        "if False:",
        samplers.test_rows_without_a_choice_are_named,
        "nothing",
        samplers.SamplingParams(0),
    ),
    "the model's own end tokens are ignored": (
        "_own_ends(model) if eos_id <= last]",
        "_own_ends(model) if False]",
        samplers.test_the_models_own_end_tokens_end,
    ),
    "text ignores the model's own end tokens": (
        "[*_own_ends(model), tokenizer.eos_token_id]",
        "[tokenizer.eos_token_id]",
        texts.test_text_ends_at_the_models_own_end_tokens,
    ),
    "do_sample is not read": (
        'own.get("do_sample") is False or',
        "",
        samplers.test_what_generation_settings_mean,
        {"do_sample": False, "temperature": 1.5},
        {"temperature": 0},
    ),
    "an end token of a caller is ignored": (
        "token in eos_ids for",
        "token in eos_ids[:1] for",
        texts.test_end_tokens_of_the_caller_and_of_the_tokenizer,
    ),
    "computes on after the stop": (
        "if all(done or text.stopped",
        "if False and all(done or text.stopped",
        texts.test_a_stopped_stream_stops_computing,
    ),
}
NAMES = (
    "LogitsError",
    "SamplingParams",
    "distribution",
    "sample",
    "stop_ids",
    "sampling_defaults",
    "filter_logits",
    "penalize_repetition",
    "pad_left",
    "_padded",
    "generate",
    "TextStream",
    "complete",
    "complete_many",
    "stream",
)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, monkeypatch):
    old, new, check, *arguments = MUTANTS[name]
    assert SOURCE.count(old) == 1
    mutant = types.ModuleType("qwen_analog.mutant")
    mutant.__package__ = "qwen_analog"
    for method in (
        "generate",
        "stream",
    ):  # the mutant's module sets both when it is run
        monkeypatch.setattr(QwenForCausalLM, method, getattr(QwenForCausalLM, method))
    exec(compile(SOURCE.replace(old, new), "mutant.py", "exec"), vars(mutant))
    for tests in (samplers, texts):
        for public in NAMES:
            if hasattr(tests, public):
                monkeypatch.setattr(tests, public, vars(mutant)[public])
    with pytest.raises(
        (AssertionError, RuntimeError, ValueError, pytest.fail.Exception)
    ):
        check(*arguments)


def test_the_original_passes():
    for check, arguments in {
        (entry[2], repr(entry[3:])): (entry[2], entry[3:]) for entry in MUTANTS.values()
    }.values():
        check(*arguments)
