"""Beams against Hugging Face's, speculation against the model's own distribution."""

import math

import pytest
import torch
from book import scramble_
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_analog import QwenConfig, QwenForCausalLM
from qwen_analog import search as module
from qwen_analog.sampling import filter_logits
from qwen_analog.search import beam_search, speculate

SHAPE = dict(
    vocab_size=24,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=128,
    rope_theta=1e4,
)


def tiny(seed=0, layers=2, flat=0.3, vocab_size=24):
    """A scrambled model; `flat` makes its distributions less sharp."""
    shape = {
        **SHAPE,
        "num_hidden_layers": layers,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
    }
    model = scramble_(QwenForCausalLM(QwenConfig(**shape)), seed).eval()
    with torch.no_grad():
        model.lm_head.weight *= flat
    return model


def theirs(model):
    values = model.config.to_dict()
    rotation = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    del values["rope_scaling"], values["attention_bias"]
    reference = Qwen2ForCausalLM(Qwen2Config(**values, rope_parameters=rotation)).eval()
    reference.load_state_dict(model.state_dict())
    reference.generation_config.eos_token_id = None
    return reference


PROMPT = torch.tensor([[3, 1, 4, 1, 5, 7, 2]])


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -0.7, 2.0])
def test_beams_are_hugging_faces(length_penalty, early_stopping):
    for seed in range(3):
        model = tiny(seed)
        reference = theirs(model)
        for num_beams, eos, steps in (
            (1, None, 6),
            (3, None, 9),
            (4, [7, 11], 20),
            (5, [0, 1, 2], 12),
        ):
            expected = reference.generate(
                PROMPT,
                num_beams=num_beams,
                num_return_sequences=num_beams,
                max_new_tokens=steps,
                do_sample=False,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                eos_token_id=eos,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
            )
            found = beam_search(
                model,
                PROMPT,
                steps,
                num_beams=num_beams,
                num_return_sequences=num_beams,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                eos_token_id=eos,
            )
            if num_beams == 1:  # of theirs that is greedy search, without a score
                assert torch.equal(found[0].tokens, expected.sequences[0])
                continue
            assert len(found) == num_beams
            for beam, tokens, score in zip(
                found, expected.sequences, expected.sequences_scores
            ):
                assert (
                    torch.equal(beam.tokens, tokens[: len(beam.tokens)])
                    and len(set(tokens[len(beam.tokens) :].tolist())) < 2
                )  # the rest is filling
                assert beam.score == pytest.approx(score.item(), abs=1e-4)


def test_a_beam_finds_what_greedy_misses_and_all_beams_find_the_best():
    """With as many beams as there are continuations, the search is exhaustive."""
    model = tiny(1)
    best = beam_search(model, PROMPT, 2, num_beams=12)[0]
    first = model(PROMPT)[0, -1].log_softmax(-1)
    pairs = torch.stack(
        [
            first[a]
            + model(torch.cat((PROMPT, torch.tensor([[a]])), 1))[0, -1].log_softmax(-1)
            for a in range(24)
        ]
    )
    assert best.score * 2 == pytest.approx(pairs.max().item(), abs=1e-4)
    assert best.score >= beam_search(model, PROMPT, 2, num_beams=1)[0].score - 1e-5


def chi_squared(counts, p):
    """How unlikely the counts are under p: (statistic - degrees) / sqrt(2 * degrees),
    about normal. Rare cells are taken together.
    """
    order = p.argsort(descending=True)
    p, counts = p[order], counts[order]
    many = int((p * counts.sum() > 5).sum())
    p, counts = (
        torch.cat((x[:many], x[many:].sum(0, keepdim=True))) for x in (p, counts)
    )
    statistic = (
        ((counts - p * counts.sum()) ** 2 / (p * counts.sum()).clamp(min=1))
        .sum()
        .item()
    )
    degrees = many
    return (statistic - degrees) / math.sqrt(2 * degrees)


def pair_counts(draw, draws):
    counts = torch.zeros(8, 8)
    for seed in range(draws):
        a, b = draw(seed)[0, -2:].tolist()
        counts[a, b] += 1
    return counts.flatten()


def pair_distribution(model, **options):
    """Of the first two new tokens, [8 * 8]."""

    def after(ids):
        return filter_logits(
            model(ids)[:, -1].float(),
            options.get("temperature", 1.0),
            options.get("top_k"),
            options.get("top_p"),
        ).softmax(-1)[0]

    with torch.no_grad():
        first = after(PROMPT)
        return torch.cat(
            [
                first[a] * after(torch.cat((PROMPT, torch.tensor([[a]])), 1))
                for a in range(8)
            ]
        )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 5}])
def test_speculation_keeps_the_distribution(options):
    model, draft = (
        tiny(0, flat=0.6, vocab_size=8),
        tiny(5, layers=1, flat=0.6, vocab_size=8),
    )
    p = pair_distribution(model, **options)
    counts = pair_counts(
        lambda seed: (
            speculate(
                model, draft, PROMPT, 2, draft_tokens=3, seed=seed, **options
            ).tokens
        ),
        700,
    )
    assert chi_squared(counts, p) < 4
    assert (
        chi_squared(
            pair_counts(
                lambda seed: draft.generate(PROMPT, 2, seed=seed, **options), 700
            ),
            p,
        )
        > 20
    )  # the draft's own would be noticed


def replaced_from(rest_of):
    """`_judge` with another distribution for the replacement."""
    judge = module._judge

    def mutant(p, q, guesses, ends, generator):
        new, right = judge(p, q, guesses, ends, generator)
        if right < len(guesses) and right < len(new):
            rest = rest_of(p[right], q[right]).clamp(min=0)
            rest = rest if rest.any() else p[right]
            new[right] = module._draw(rest, generator)
        return new, right

    return mutant


def accepted_where(rule):
    """`_judge` with another rule of acceptance, rule(u, p, q, guess)."""

    def mutant(p, q, guesses, ends, generator):
        for i, guess in enumerate(guesses):
            u = torch.rand((), generator=generator)
            if not rule(u, p[i], q[i], guess):
                rest = (p[i] - q[i]).clamp(min=0)
                rest = rest if rest.any() else p[i]
                return [*guesses[:i], module._draw(rest, generator)], i
        return [*guesses, module._draw(p[-1], generator)], len(guesses)

    return mutant


JUDGES = {
    "replaced from p": replaced_from(lambda p, q: p),
    "replaced from q - p": replaced_from(lambda p, q: q - p),
    "accepted with p(x)": accepted_where(lambda u, p, q, x: u < p[x]),
    "every guess believed": accepted_where(lambda u, p, q, x: True),
    "believed if the likeliest": accepted_where(lambda u, p, q, x: x == p.argmax()),
    "refused wherever q > p": accepted_where(lambda u, p, q, x: q[x] <= p[x]),
}


@pytest.mark.mutant
@pytest.mark.parametrize("name", JUDGES)
def test_a_broken_judge_is_noticed(name, monkeypatch):
    monkeypatch.setattr(module, "_judge", JUDGES[name])
    model = tiny(0, flat=0.6, vocab_size=8)
    draft = tiny(5, layers=1, flat=0.6, vocab_size=8)
    counts = pair_counts(
        lambda seed: (
            speculate(model, draft, PROMPT, 2, draft_tokens=3, seed=seed).tokens
        ),
        700,
    )
    assert chi_squared(counts, pair_distribution(model)) > 8


@pytest.mark.parametrize("draft_tokens", [1, 4, 9])
def test_greedy_speculation_is_greedy_decoding(draft_tokens):
    for seed in range(4):
        model, draft = tiny(seed, flat=1.0), tiny(seed + 9, layers=1)
        for steps in (0, 1, 2, 25):
            found = speculate(
                model, draft, PROMPT, steps, draft_tokens=draft_tokens, temperature=0
            )
            assert torch.equal(
                found.tokens, model.generate(PROMPT, steps, temperature=0)
            )
        ends = speculate(
            model,
            draft,
            PROMPT,
            25,
            draft_tokens=draft_tokens,
            temperature=0,
            eos_token_id=[3, 8],
        ).tokens
        assert torch.equal(
            ends, model.generate(PROMPT, 25, temperature=0, eos_token_id=[3, 8])
        )


def test_a_model_that_drafts_for_itself_is_always_believed():
    model = tiny(2)
    found = speculate(model, model, PROMPT, 20, draft_tokens=4, seed=1)
    assert found.accepted == found.proposed and found.passes == 4


def test_ids_of_padding_are_in_no_beam():
    """As many beams as the valid ids allow: at the first step all of them are
    candidates.
    """
    beams = beam_search(
        tiny(), PROMPT, 1, num_beams=4, num_return_sequences=4, valid_vocab_size=8
    )
    assert (
        all(beam.tokens[-1] < 8 and beam.score > -math.inf for beam in beams)
        and len(beams) == 4
    )
    with pytest.raises(ValueError, match="num_beams"):
        beam_search(tiny(), PROMPT, 1, num_beams=5, valid_vocab_size=8)


def test_without_a_seed_speculation_draws_from_torchs_own_numbers():
    model, draft = tiny(0), tiny(5, layers=1)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(speculate(model, draft, PROMPT, 20).tokens)
    assert torch.equal(*drawn) and not torch.equal(
        drawn[0], speculate(model, draft, PROMPT, 20).tokens
    )


@pytest.mark.parametrize(
    "search",
    [
        lambda m: beam_search(m, PROMPT, 2),
        lambda m: speculate(m, m, PROMPT, 2, temperature=0),
    ],
)
def test_logits_that_are_not_finite_are_refused(search):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        search(model)


def test_never_stopping_finds_what_stopping_misses():
    """With many end tokens; Hugging Face's score is the reference, and another than
    that of the other two.
    """
    model, eos, scores = tiny(4, flat=1.0), list(range(1, 7)), []
    for early_stopping in ("never", True, False):
        options = dict(
            num_beams=3,
            early_stopping=early_stopping,
            eos_token_id=eos,
            length_penalty=2.0,
        )
        expected = theirs(model).generate(
            PROMPT,
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        scores.append(beam_search(model, PROMPT, 40, **options)[0].score)
        assert scores[-1] == pytest.approx(
            expected.sequences_scores[0].item(), abs=1e-4
        )
    assert scores[0] > max(scores[1:]) + 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=1e-40),
        dict(temperature=5e-324),
        dict(temperature=1e300),
        dict(repetition_penalty=1e-300),
        dict(repetition_penalty=1e300),
        dict(top_p=1e-300),
        dict(min_p=1.0),
        dict(top_k=10**12),
    ],
    ids=str,
)
def test_every_legal_setting_draws(settings):
    model, draft = tiny(0), tiny(5, layers=1)
    expected = model.generate(PROMPT, 6, seed=3, **settings)
    assert (
        speculate(model, draft, PROMPT, 6, seed=3, **settings).tokens.shape
        == expected.shape
    )
    if settings.get("temperature", 1) < 1:
        greedy = model.generate(PROMPT, 6, temperature=0)
        assert torch.equal(
            speculate(model, draft, PROMPT, 6, seed=3, **settings).tokens, greedy
        ) and torch.equal(expected, greedy)


def test_a_penalty_in_speculation_is_generates():
    model, draft, options = (
        tiny(0, flat=1.0),
        tiny(5, layers=1),
        dict(repetition_penalty=1.6),
    )
    greedy = model.generate(PROMPT, 30, temperature=0, **options)
    assert not torch.equal(greedy, model.generate(PROMPT, 30, temperature=0))
    for draft_tokens in (1, 3, 8):
        assert torch.equal(
            speculate(
                model,
                draft,
                PROMPT,
                30,
                draft_tokens=draft_tokens,
                temperature=0,
                **options,
            ).tokens,
            greedy,
        )


def test_distributions_that_differ_by_rounding_only_still_draw(monkeypatch):
    """A guess that is refused although nothing is left of p - q: drawn from p."""
    p = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    q = p.clone()
    q[:, 0] += 1e-7
    monkeypatch.setattr(
        module,
        "distribution",
        lambda logits, sampling, *rest: (p if len(logits) == 2 else q[:1])[
            : len(logits)
        ],
    )
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1.0))
    model = tiny(vocab_size=2)
    for seed in range(4):
        assert speculate(
            model, model, PROMPT % 2, 5, draft_tokens=1, seed=seed
        ).tokens.shape == (1, 12)


def test_the_models_own_end_tokens_end_every_search():
    model, draft = tiny(3, flat=1.0), tiny(5, layers=1)
    free = model.generate(PROMPT, 20, temperature=0)
    own = [int(free[0, 12]), 5]
    calls = {
        "speculate": lambda **o: (
            speculate(model, draft, PROMPT, 20, temperature=0, **o).tokens
        ),
        "beams": lambda **o: beam_search(model, PROMPT, 20, **o)[0].tokens,
    }
    ended, without = (
        {name: call(eos_token_id=ids) for name, call in calls.items()}
        for ids in (own, [])
    )
    model.generation_config = {"eos_token_id": own}
    draft.generation_config = {
        "eos_token_id": int(PROMPT[0, 0])
    }  # the draft's word does not count
    for name, call in calls.items():
        assert torch.equal(call(), ended[name]) and torch.equal(
            call(eos_token_id=[]), without[name]
        ), name
    assert len(ended["speculate"][0]) < len(without["speculate"][0]) and len(
        ended["beams"]
    ) != len(without["beams"])


BEAMS = [
    ("early_stopping", value)
    for value in ("always", "yes", "", 1, 0, None, 2.0, math.nan, [True])
]
BEAMS += [
    ("length_penalty", value)
    for value in (
        math.nan,
        math.inf,
        -math.inf,
        1000.0,
        -1000.0,
        10**400,
        "long",
        None,
        True,
        [1.0],
    )
]
BEAMS += [
    (name, value)
    for name in (
        "num_beams",
        "num_return_sequences",
        "max_new_tokens",
        "valid_vocab_size",
    )
    for value in (0, -1, math.nan, math.inf, True, "2", 1.5, 10**30)
]
BEAMS += [("eos_token_id", value) for value in (24, -1, "2", [1, 1.5], True)]
DRAFTS = [
    (name, value)
    for name in (
        "draft_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
        "max_new_tokens",
    )
    for value in (-1, math.nan, math.inf, True, "2")
]


@pytest.mark.parametrize("name, value", BEAMS, ids=lambda v: repr(v)[:20])
def test_wrong_arguments_of_beam_search_are_named(name, value):
    with pytest.raises(ValueError, match=name) as error:
        beam_search(tiny(), **{"input_ids": PROMPT, "max_new_tokens": 60, name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, value", DRAFTS, ids=lambda v: repr(v)[:20])
def test_wrong_arguments_of_speculation_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be "):
        speculate(tiny(), tiny(), PROMPT, **{"max_new_tokens": 4, name: value})


@pytest.mark.parametrize("length_penalty", [-140, 140.0, 0, 1e-300])
def test_far_length_penalties_give_finite_scores(length_penalty):
    beams = beam_search(
        tiny(),
        PROMPT,
        60,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=length_penalty,
        eos_token_id=[1, 2],
    )
    assert all(math.isfinite(beam.score) for beam in beams)


def test_beams_that_the_vocabulary_does_not_feed_are_refused():
    with pytest.raises(
        ValueError,
        match=(
            "^num_beams 1 needs 41 candidates for each beam, one more .*; the"
            " vocabulary has 24 tokens$"
        ),
    ):
        beam_search(tiny(), PROMPT, 3, num_beams=1, eos_token_id=list(range(20)) * 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: beam_search(m, PROMPT, 3, num_beams=0), "num_beams"),
        (lambda m: beam_search(m, PROMPT, 3, num_beams=13), "num_beams"),
        (lambda m: beam_search(m, PROMPT, 0), "max_new_tokens"),
        (lambda m: beam_search(m, PROMPT, 3, num_beams=2.0), "num_beams"),
        (
            lambda m: speculate(
                m,
                QwenForCausalLM(QwenConfig(**{**SHAPE, "max_position_embeddings": 9})),
                PROMPT,
                3,
            ),
            "max_position_embeddings is 9",
        ),
        (
            lambda m: beam_search(m, PROMPT, 3, num_beams=2, num_return_sequences=3),
            "num_return_sequences",
        ),
        (lambda m: beam_search(m, PROMPT.repeat(2, 1), 3), "one prompt"),
        (lambda m: speculate(m, m, PROMPT.repeat(2, 1), 3), "one prompt"),
        (lambda m: speculate(m, m, PROMPT, 3, draft_tokens=0), "draft_tokens"),
        (lambda m: speculate(m, m, PROMPT, 300), "max_position_embeddings"),
        (
            lambda m: speculate(
                m, QwenForCausalLM(QwenConfig(**{**SHAPE, "vocab_size": 25})), PROMPT, 3
            ),
            "vocabulary of 25",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())


def keys_stay(follow):
    def mutant(cache, running):
        origins = sorted(beam.row for beam in running)
        follow(cache, [b._replace(row=row) for b, row in zip(running, origins)])

    return mutant


def no_spare(grow):
    return lambda logprobs, running, count: grow(logprobs, running, count)[
        : len(running)
    ]


def only_the_last_step(grow):
    return lambda logprobs, running, count: grow(
        logprobs, [beam._replace(logprob=0.0) for beam in running], count
    )


def prompt_counts(score):
    return lambda rules, logprob, n: score(rules, logprob, n + PROMPT.shape[1])


def spare_may_finish(finish):
    def mutant(rules, finished, grown, n):
        ended = [beam for beam in grown if beam.tokens[-1] in rules.ends]
        return finish(rules, finished, ended + grown, n)

    return mutant


def stops_when_full(over):
    return lambda rules, finished, best, n: len(finished) == rules.num_beams


def ended_go_on(go_on):
    return lambda rules, grown: grown[: rules.num_beams]


def length_not_counted(score):
    return lambda rules, logprob, n: logprob


def not_normalised(grow):
    return lambda logprobs, running, count: grow(logprobs * 1.5, running, count)


BEAM_MUTANTS = {
    "keys stay in their rows": (module, "_follow", keys_stay),
    "no spare candidates": (module, "_grow", no_spare),
    "only the last step counts": (module, "_grow", only_the_last_step),
    "the prompt counts as length": (module._Rules, "score", prompt_counts),
    "spare candidates may finish": (module._Rules, "finish", spare_may_finish),
    "stops with the first num_beams ends": (module._Rules, "over", stops_when_full),
    "ended beams go on": (module._Rules, "go_on", ended_go_on),
    "the length is not counted": (module._Rules, "score", length_not_counted),
    "logits are not normalised": (module, "_grow", not_normalised),
}


@pytest.mark.mutant
@pytest.mark.parametrize("name", BEAM_MUTANTS)
def test_a_broken_search_is_noticed(name, monkeypatch):
    owner, part, change = BEAM_MUTANTS[name]
    monkeypatch.setattr(owner, part, change(getattr(owner, part)))
    with pytest.raises((AssertionError, ValueError, IndexError, RuntimeError)):
        for length_penalty in (1.0, 0.0, -0.7, 2.0):
            test_beams_are_hugging_faces(length_penalty, False)


@pytest.mark.mutant
def test_guesses_that_stay_in_the_cache_are_noticed(monkeypatch):
    monkeypatch.setattr(module._Reader, "forget", lambda reader, length: None)
    with pytest.raises((AssertionError, ValueError)):
        test_greedy_speculation_is_greedy_decoding(4)
