"""Broken generators: each broken part must be noticed by the test that is named beside
it.
"""

import dataclasses
import math
from itertools import product

import pytest
import test_generate as samplers
import test_sampling as draws
import test_text_stream as texts
import torch

from qwen_analog import generate, sampling, text_stream


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
                sampling.filter_logits(logits, **options),
                samplers.warpers(**options)(None, logits),
            ), options


def the_same_penalty():
    dice = torch.Generator().manual_seed(0)
    logits, ids = (
        torch.randn(8, 30, generator=dice),
        torch.randint(30, (8, 12), generator=dice),
    )
    assert torch.equal(
        sampling.penalize_repetition(logits, ids, 1.7),
        draws.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone()),
    )
    mask = (torch.arange(12) > 5).expand(8, 12)
    assert torch.equal(
        sampling.penalize_repetition(logits, ids, 1.7, mask),
        sampling.penalize_repetition(logits, ids[:, 6:], 1.7),
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


ALONE = samplers.test_each_row_of_a_ragged_batch_is_that_row_alone
ENDS = samplers.test_rows_of_a_ragged_batch_end_and_are_filled_up

divide, penalize = sampling._divide, sampling._penalize
exponential, sample = sampling._exponential, sampling.sample
plain_decode, plain_prefill = generate._decode, generate.prefill
next_logits, logprobs_of = generate.next_logits, generate._logprobs
positions_and_mask, requested_stop_ids = (
    generate.positions_and_mask,
    generate.requested_stop_ids,
)


def drops_the_kth(logits, top_k):
    kth = logits.topk(min(top_k[0], logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits <= kth, -torch.inf)


def top_p_by(removed_of, *, keep_one=True, scatter=True):
    """`_keep_top_p` with another rule, removed_of(p, limit), p sorted upwards."""

    def mutant(logits, top_p):
        ascending, order = logits.sort()
        removed = removed_of(ascending.softmax(-1), 1 - top_p[0])
        if keep_one:
            removed[..., -1] = False
        removed = removed.scatter(-1, order, removed) if scatter else removed
        return logits.masked_fill(removed, -torch.inf)

    return mutant


def right_top_p(p, limit):
    return p.cumsum(-1) <= limit


def min_p_by(removed_of):
    def mutant(logits, min_p):
        p = logits.softmax(-1)
        removed = removed_of(p, min_p[0], p.amax(-1, keepdim=True))
        return logits.masked_fill(removed, -torch.inf)

    return mutant


def penalty_by(change):
    """`_penalize` with another change of what was seen, change(logits, penalty)."""

    def mutant(logits, history, penalties, attention_mask):
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, history, True)
        return torch.where(seen, change(logits, penalties[0]), logits)

    return mutant


def without_clamp(logits, penalty):
    return torch.where(logits < 0, logits * penalty, logits / penalty)


def one_generator_for_all(p, greedy, generators):
    several = isinstance(generators, list)
    return exponential(p, greedy, generators[0] if several else generators)


def noise_for_greedy_rows(p, greedy, generators):
    return exponential(p, [False] * len(p), generators)


def padding_visible(padding, start, end):
    positions, mask = positions_and_mask(padding, start, end)
    keys = torch.arange(end)
    return positions, (keys <= keys[start:, None]).expand_as(mask)


def padding_sees_nothing(padding, start, end):
    positions, mask = positions_and_mask(padding, start, end)
    return positions, mask & (torch.arange(end) >= padding[:, None, None, None])


def positions_not_shifted(padding, start, end):
    mask = positions_and_mask(padding, start, end)[1]
    return torch.arange(start, end).expand(len(padding), -1), mask


def padding_on_the_right(rows, pad_id):
    T = max(map(len, rows))
    ids = [list(row) + [pad_id] * (T - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (T - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def in_sixteen_bits(*arguments, **options):
    return next_logits(*arguments, **options).bfloat16()


def first_position(model, ids, cache=None, padding=None, last=1):
    return next_logits(model, ids, cache, padding, ids.shape[1])[:, :1]


def last_token_only(model, prompt, cache=None, padding=None, copies=1):
    unread = prompt[:, -1:] if cache is None else prompt
    return plain_prefill(model, unread, cache, padding, copies)


def without_a_memory(model, token, cache, padding=None):
    return plain_prefill(model, token[:, None], None, None)


def samples_mixed_up(model, prompt, cache=None, padding=None, copies=1):
    logits = plain_prefill(model, prompt, cache, padding)
    cache.keys = cache.keys.repeat(1, copies, 1, 1, 1)
    cache.values = cache.values.repeat(1, copies, 1, 1, 1)
    return logits.repeat_interleave(copies, dim=0)


def seed_starts_again(logits, params, tokens, real, generator):
    return sample(logits, params, tokens, real, generator.manual_seed(params.seed))


def filled_with_something_else(*arguments):
    ended = []
    for step in plain_decode(*arguments):
        ids = [0 if e else i for i, e in zip(step.ids, ended or [False] * 99)]
        ended = step.ended
        yield step._replace(ids=ids)


def all_ids_valid(model, prompt, padding, wishes):
    wishes = dataclasses.replace(wishes, valid_vocab_size=None)
    return plain_decode(model, prompt, padding, wishes)


class StaysInEvalMode(generate.evaluating):
    def __exit__(self, *error):
        pass


def names_only(model):
    own = model.generation_config
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: getattr(own, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def one_end_of_the_caller(model, ids, n, eos_token_id=None, **options):
    ends = eos_token_id[:1] if isinstance(eos_token_id, list) else eos_token_id
    return generate.decode_steps(model, ids, n, eos_token_id=ends, **options)


def release_by(shown_of):
    """`_release` that shows shown_of(waiting, complete) of a stopped text."""

    def mutant(self, piece):
        for character in "" if self.stopped else piece:
            self._waiting.append(character)
            if complete := self._finder.push(character):
                self.stopped = True
                text = self._take(shown_of(len(self._waiting), complete))
                self._waiting.clear()
                return text
        return self._take(len(self._waiting) - self._finder.begun)

    return mutant


def push_by(complete_of):
    """`StopFinder.push` with another rule for what is complete in a new state."""

    def mutant(self, character):
        state, made = self._state, []
        while state is not None and character not in state.next:
            made += self._make(state, character)
            state = state.shorter
        end = self._root if state is None else state.next[character]
        for new in reversed(made):
            new.shorter, new.complete = end, complete_of(new.complete, end.complete)
            end = new
        self._state = end
        return end.complete

    return mutant


# name: where the broken part goes, its name, the part, the check and its arguments
S, G, X = sampling, generate, text_stream
MUTANTS = {
    "temperature multiplied": (
        (S, "_divide", lambda logits, ts: divide(logits, [1 / t for t in ts])),
        the_same_filters,
    ),
    "top-k drops the k-th": ((S, "_keep_top_k", drops_the_kth), the_same_filters),
    "top-p drops the crossing token": (
        (S, "_keep_top_p", top_p_by(lambda p, limit: p.cumsum(-1) - p < limit)),
        the_same_filters,
    ),
    "top-p may keep nothing": (
        (S, "_keep_top_p", top_p_by(right_top_p, keep_one=False)),
        the_same_filters,
    ),
    "top-p in sorted order": (
        (S, "_keep_top_p", top_p_by(right_top_p, scatter=False)),
        the_same_filters,
    ),
    "min-p relative to 1": (
        (S, "_keep_min_p", min_p_by(lambda p, share, most: p < share)),
        the_same_filters,
    ),
    "min-p drops its bound": (
        (S, "_keep_min_p", min_p_by(lambda p, share, most: p <= share * most)),
        the_same_filters,
    ),
    "penalty divides negative logits": (
        (S, "_penalize", penalty_by(lambda logits, penalty: logits / penalty)),
        the_same_penalty,
    ),
    "penalty applied to padding": (
        (S, "_penalize", lambda z, ids, p, mask: penalize(z, ids, p, None)),
        the_same_penalty,
    ),
    "a quotient that overflows": (
        (S, "_divide", lambda logits, ts: logits / torch.tensor(ts)[:, None]),
        draws.test_every_legal_setting_draws_from_finite_logits,
        dict(temperature=1e-40),
    ),
    "a penalised logit that overflows": (
        (S, "_penalize", penalty_by(without_clamp)),
        draws.test_every_legal_setting_draws_from_finite_logits,
        dict(repetition_penalty=1e-300),
    ),
    "rows without a choice are drawn from": (
        (draws, "sample", lambda *a, **o: sample(*a, **o).clamp(min=0)),
        draws.test_rows_without_a_choice_get_no_id,
        "nothing",
        sampling.SamplingParams(0),
    ),
    "a row that was not drawn is written": (
        (G, "check_ids", lambda ids: [max(i, 0) for i in ids]),
        samplers.test_logits_that_are_not_finite,
        dict(temperature=0),
        math.nan,
    ),
    "all rows draw from one generator": (
        (S, "_exponential", one_generator_for_all),
        draws.test_rows_with_different_wishes_are_what_they_are_alone,
        0,
    ),
    "greedy rows take random numbers": (
        (S, "_exponential", noise_for_greedy_rows),
        draws.test_random_numbers_are_taken_from_each_rows_own_generator,
    ),
    "the first row's temperature for all": (
        (S, "_divide", lambda logits, ts: divide(logits, ts[:1] * len(ts))),
        draws.test_rows_with_different_wishes_are_what_they_are_alone,
        0,
    ),
    "penalty forgets the prompt's padding": (
        (G, "_real_tokens", lambda tokens, padding: None),
        ALONE,
        "plain",
        dict(repetition_penalty=1.3),
    ),
    "positions not shifted for padding": (
        (G, "positions_and_mask", positions_not_shifted),
        samplers.test_positions_count_from_each_rows_own_beginning,
        True,
    ),
    "padding visible": ((G, "positions_and_mask", padding_visible), ALONE, "plain", {}),
    "padding sees nothing": (
        (samplers, "positions_and_mask", padding_sees_nothing),
        samplers.test_every_token_sees_something,
    ),
    "padding on the right": (
        (samplers, "pad_left", padding_on_the_right),
        samplers.test_pad_left,
    ),
    "draws in the model's dtype": ((G, "next_logits", in_sixteen_bits), sixteen_bits),
    "uncached reads the last token only": (
        (G, "prefill", last_token_only),
        samplers.test_draws_equal_a_loop_over_hugging_face_warpers,
        torch.float64,
    ),
    "the cache is not read": (
        (G, "decode_one_token", without_a_memory),
        samplers.test_greedy_equals_hugging_face,
        "plain",
        9,
    ),
    "logits of the first position": (
        (G, "next_logits", first_position),
        samplers.test_greedy_equals_hugging_face,
        "plain",
        9,
    ),
    "the seed starts again at each step": (
        (G, "sample", seed_starts_again),
        samplers.test_draws_equal_hugging_face_logits_and_warpers,
    ),
    "the seed goes to the global dice": (
        (G, "new_generator", lambda device, seed: torch.manual_seed(seed)),
        samplers.test_the_seed_repeats_and_touches_nothing_else,
        "cpu",
    ),
    "samples of rows mixed up": (
        (G, "prefill", samples_mixed_up),
        samplers.test_samples_of_a_row_stand_together_and_read_the_prompt_once,
    ),
    "log-probabilities of other logits": (
        (G, "_logprobs", lambda z, ids, ended: logprobs_of(z / 0.8, ids, ended)),
        samplers.test_log_probabilities_are_those_of_a_plain_forward,
        dict(seed=1, repetition_penalty=1.5),
    ),
    "filling has log-probabilities": (
        (G, "_logprobs", lambda z, ids, ended: logprobs_of(z, ids, [False] * len(z))),
        samplers.test_log_probabilities_are_those_of_a_plain_forward,
        dict(temperature=0),
    ),
    "only the first end token counts": (
        (
            G,
            "requested_stop_ids",
            lambda *arguments: requested_stop_ids(*arguments)[:1],
        ),
        samplers.test_rows_end_are_filled_up_and_stop_together,
        dict(temperature=0),
        True,
    ),
    "ended rows are not filled": ((G, "_decode", filled_with_something_else), ENDS),
    "stops with the first row": ((G, "all", any), ENDS),
    "a padding row may win": (
        (G, "_decode", all_ids_valid),
        samplers.test_padding_rows_are_never_chosen,
        dict(temperature=0),
        True,
    ),
    "stays in eval mode": (
        (G, "evaluating", StaysInEvalMode),
        samplers.test_every_module_gets_its_mode_back,
        None,
    ),
    "keeps the graph": (
        (G, "_decode", plain_decode.__wrapped__),
        samplers.test_cached_logits_and_the_work_of_a_step,
    ),
    "the model's own end tokens are ignored": (
        (G, "own_stop_ids", lambda model: []),
        samplers.test_the_models_own_end_tokens_end,
    ),
    "do_sample is not read": (
        (samplers, "sampling_defaults", names_only),
        samplers.test_what_generation_settings_mean,
        {"do_sample": False, "temperature": 1.5},
        {"temperature": 0},
    ),
    "text ignores the model's own end tokens": (
        (X, "stop_ids", lambda model, tokenizer: [tokenizer.eos_token_id]),
        texts.test_text_ends_at_the_models_own_end_tokens,
    ),
    "an end token of a caller is ignored": (
        (X, "decode_steps", one_end_of_the_caller),
        texts.test_end_tokens_of_the_caller_and_of_the_tokenizer,
    ),
    "computes on after the stop": (
        (X, "all", lambda rows: False),
        texts.test_a_stopped_stream_stops_computing,
    ),
    "broken bytes wait for ever": (
        (X, "_open_end", lambda text: len(text) - len(text.rstrip("\ufffd"))),
        texts.test_broken_bytes_do_not_wait_for_ever,
    ),
    "stop strings are shown": (
        (X.TextStream, "_release", release_by(lambda waiting, complete: waiting)),
        stops,
    ),
    "half stop strings are shown": ((X.StopFinder, "begun", 0), stops),
    "more is held back than needed": (
        (
            X.StopFinder,
            "begun",
            property(lambda self: max(map(len, self._strings), default=0)),
        ),
        stops,
    ),
    "what was held back is lost": (
        (X.TextStream, "finish", lambda self: self._release(self._decoder.finish())),
        stops,
    ),
    "a stop string in another's beginning is missed": (
        (X.StopFinder, "push", push_by(lambda own, shorter: own)),
        stops,
    ),
    "the shorter of two stop strings counts": (
        (X.StopFinder, "push", push_by(lambda own, shorter: shorter or own)),
        stops,
    ),
}


@pytest.mark.mutant
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, monkeypatch):
    (owner, part, broken), check, *arguments = MUTANTS[name]
    monkeypatch.setattr(owner, part, broken, raising=part != "all")
    with pytest.raises(
        (AssertionError, RuntimeError, ValueError, pytest.fail.Exception)
    ):
        check(*arguments)


@pytest.mark.mutant
def test_the_original_passes():
    for check, arguments in {
        (entry[1], repr(entry[2:])): (entry[1], entry[2:]) for entry in MUTANTS.values()
    }.values():
        check(*arguments)
