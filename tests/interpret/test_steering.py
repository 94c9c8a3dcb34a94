"""Turning concepts: what an edit is, that it acts where it should and nowhere else, and that what is measured is so."""

import math

import pytest
import torch

import tiny
from megacocomix.errors import UserError
from megacocomix.interpret.decode import Sampling, decode, fit_prompt
from megacocomix.interpret.steering import Edit, Steering, kept_concepts, parse_edit
from megacocomix.sae.model import SAE, SAEForm
from megacocomix.teacher.model import Teacher, gpt2_teacher

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
SAMPLING = Sampling(max_new_tokens=6, seed=3)


@torch.no_grad()
def grown(student, edits=None, prompts=PROMPTS, sampling=SAMPLING, **options):
    """The steps of each text."""
    texts = [[] for _ in prompts]
    for steps in decode(student, prompts, sampling, edits, **options):
        for text, step in zip(texts, steps, strict=True):
            text += [step] if step else []
    return texts


def tokens_of(texts):
    return [[step.token for step in text] for text in texts]


def frequent(student):
    """The concept that is kept most often in unsteered texts."""
    kept = [concept for text in grown(student) for step in text for concept, _ in step.kept]
    return max(set(kept), key=kept.count)


@pytest.mark.parametrize(
    ("text", "logit", "steered"),
    [
        ("7=8", 0.5, 4.0),
        ("7=-10", 0.5, -5.0),
        ("7=set:2.5", -3.0, 2.5),
        ("7=min:1", 0.5, 1.0),
        ("7=min:1", 3.0, 3.0),
        ("7=max:-1", 0.5, -1.0),
        ("7=max:-1", -2.0, -2.0),
        ("7=clamp:-1:2.5", 3.0, 2.5),
        ("7=clamp:-1:2.5", -3.0, -1.0),
        ("7=set:5.12345678", 0.0, pytest.approx(5.12345678)),
    ],
)
def test_an_edit_scales_sets_or_clamps_and_prints_as_it_is_typed(text, logit, steered):
    edit = parse_edit(text, 10)
    assert edit(torch.tensor(logit)).item() == steered
    assert str(edit) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10=2", "the model has concepts 0 … 9"),
        ("-1=2", "is not ID=SCALE"),
        ("x=2", "is not ID=SCALE"),
        ("³=2", "is not ID=SCALE"),
        ("7", "is not ID=SCALE"),
        ("7=", "is not a number"),
        ("7=nan", "is not a number"),
        ("7=1e999", "is not a number"),
        ("7=11", "Nearest valid: 10"),
        ("7=-11", "Nearest valid: -10"),
        ("7=sett:3", "Did you mean set?"),
        ("7=set:1e300", "Nearest valid: 1e+06"),
        ("7=clamp:3", "is not ID=SCALE"),
        ("7=set:3:4", "is not ID=SCALE"),
        ("7=clamp:4:3", "4 is above 3"),
        ("9" * 5000 + "=8", "the model has concepts 0 … 9"),
    ],
)
def test_an_edit_that_is_none_says_what_would_be(text, message):
    with pytest.raises(UserError) as error:
        parse_edit(text, 10)
    assert message in str(error.value)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("options", [{}, {"placement": "add"}, {"interleave_every": 2}, {"insertion_layer": 2}])
def test_a_scale_of_1_changes_nothing_to_the_bit(options, place):
    student = tiny.student(**options)
    steered = grown(student, [[Edit(concept) for concept in range(tiny.LATENTS)]] * 3, place=place)
    assert steered == grown(student)
    tokens = torch.tensor(PROMPTS[2:])
    plain = student.model(tokens, use_cache=False).logits
    with Steering([[Edit(concept) for concept in range(tiny.LATENTS)]], place).of(
        student.model, torch.ones_like(tokens, dtype=torch.bool)
    ):
        assert torch.equal(student.model(tokens, use_cache=False).logits, plain)
    assert torch.equal(student.model(tokens, use_cache=False).logits, plain)  # and nothing of it stays


@pytest.mark.parametrize("at", ["decoded", "all", {1, 8}])
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("options", [{}, {"placement": "add"}, {"interleave_every": 2}, {"insertion_layer": 0}])
def test_cached_and_uncached_steered_decoding_agree(options, place, at):
    student = tiny.student(**options)
    concept = frequent(student)
    edits = [[Edit(concept, 8.0), Edit((concept + 1) % tiny.LATENTS, low=4.0)], [], [Edit(concept, -10.0)]]
    cached, whole = (grown(student, edits, place=place, at=at, cached=cached) for cached in (True, False))
    assert tokens_of(cached) == tokens_of(whole)
    for one, other in zip((s for t in cached for s in t), (s for t in whole for s in t), strict=True):
        assert one.kl == pytest.approx(other.kl, abs=1e-5)
        assert dict(one.kept) == pytest.approx(dict(other.kept), abs=1e-4)
    assert place == "after" or max(step.kl for step in cached[0]) > 1e-3
    assert all(step.kl == 0 for step in cached[1])


def test_a_text_does_not_depend_on_the_texts_beside_it():
    student = tiny.student()
    edits = [[Edit(frequent(student), 8.0)], [], [Edit(3, low=9.0)]]
    together = grown(student, edits)
    for row, (prompt, edit) in enumerate(zip(PROMPTS, edits, strict=True)):
        (alone,) = grown(student, [edit], [prompt], seeds=[SAMPLING.seed + row])
        assert tokens_of([alone]) == tokens_of(together[row : row + 1])
        assert [step.kl for step in alone] == pytest.approx([step.kl for step in together[row]], abs=1e-5)


@torch.no_grad()
def test_the_divergence_is_that_of_the_two_next_token_distributions():
    student = tiny.student()
    edit = Edit(frequent(student), 8.0)
    (text,) = grown(student, [[edit]], PROMPTS[:1])
    tokens = PROMPTS[0]
    for step in text:
        row = torch.tensor([tokens])
        where = torch.arange(row.shape[1])[None] >= len(PROMPTS[0]) - 1
        plain = student.model(row, use_cache=False).logits[0, -1].double().log_softmax(-1)
        with Steering([[edit]], "before").of(student.model, where):
            steered = student.model(row, use_cache=False).logits[0, -1].double().log_softmax(-1)
        assert step.kl == pytest.approx(float((steered.exp() * (steered - plain)).sum()), abs=1e-5)
        tokens = [*tokens, step.token]


def test_before_selection_forces_a_concept_in_and_after_it_acts_only_where_it_was_kept():
    student = tiny.student()
    tokens = torch.tensor(PROMPTS[2:])
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    with kept_concepts(student.model) as found:
        student.model(tokens, use_cache=False)
    is_kept_TC = torch.zeros(tokens.shape[1], tiny.LATENTS, dtype=torch.bool).scatter_(1, found[0][1][0], True)
    concept = int((is_kept_TC.any(0) & ~is_kept_TC.all(0)).nonzero()[0])
    edit = Edit(concept, low=50.0, high=50.0)
    with Steering([[edit]], "before").of(student.model, everywhere), kept_concepts(student.model) as found:
        student.model(tokens, use_cache=False)
    assert (found[0][1][0, :, 0] == concept).all()
    with Steering([[edit]], "after").of(student.model, everywhere), kept_concepts(student.model) as found:
        student.model(tokens, use_cache=False)
    is_it = found[0][1][0] == concept
    assert torch.equal(is_it.any(-1), is_kept_TC[:, concept])
    assert (found[0][0][0][is_it] == 50).all()


@pytest.mark.parametrize(("at", "steered"), [("decoded", {4, 5, 6}), ("all", set(range(7))), ({0, 5}, {0, 5})])
def test_chosen_tokens_alone_are_steered(at, steered):
    student = tiny.student()
    steps = grown(student, [[Edit(3, low=50.0, high=50.0)]], PROMPTS[:1], Sampling(max_new_tokens=3), at=at)[0]
    position = len(PROMPTS[0]) - 1
    assert [step.kept[0] == (3, 50.0) for step in steps] == [position + n in steered for n in range(3)]
    # What is steered before the last token is in the cache and goes on acting.
    assert (steps[0].kl > 0) == bool({n for n in steered if n <= position})


def test_a_token_without_a_slot_cannot_be_steered():
    student = tiny.student(interleave_every=2)
    (steps,) = grown(student, [[Edit(3, low=50.0)]], [[1, 2]], Sampling(max_new_tokens=4), at={2})
    assert [step.kl for step in steps] == [0, 0, 0, 0]  # the third token has none
    (steps,) = grown(student, [[Edit(3, low=50.0)]], [[1, 2]], Sampling(max_new_tokens=4), at={3})
    assert [step.kept != [] for step in steps] == [True, False, True, False]
    assert [step.kl > 0 for step in steps] == [False, False, True, True]


def test_two_edits_of_one_concept_and_models_that_cannot_be_steered_are_refused():
    with pytest.raises(UserError, match="steered twice"):
        grown(tiny.student(), [[Edit(0, 2.0), Edit(0, 4.0)], [], []])
    with pytest.raises(UserError, match="none of before, after"):
        grown(tiny.student(), [[Edit(3, 2.0)], [], []], place="beside")
    refused = {"ntp": "predicts no concepts", "direct-hidden": "hidden state", "predict-only": "mixes none"}
    for name, message in refused.items():
        with pytest.raises(UserError, match=message):
            grown(tiny.student(name=name), [[Edit(3, 2.0)], [], []])
        assert len(tokens_of(grown(tiny.student(name=name)))) == 3  # unsteered they write as any model does


def test_sampling_follows_its_options():
    student = tiny.student()
    (greedy,) = grown(student, None, PROMPTS[:1], Sampling(max_new_tokens=4, temperature=0.0))
    tokens = PROMPTS[0]
    for step in greedy:
        assert step.token == int(student.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
        tokens = [*tokens, step.token]
    for only_one in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}):
        sampling = Sampling(max_new_tokens=4, **only_one)
        assert tokens_of(grown(student, None, PROMPTS[:1], sampling)) == tokens_of([greedy])
    assert len({tuple(tokens_of(grown(student, seeds=[seed] * 3))[0]) for seed in range(4)}) == 4


def test_tokens_are_drawn_with_their_probability():
    student = tiny.student()
    rows = 4000
    first = next(iter(decode(student, [PROMPTS[0]] * rows, Sampling(max_new_tokens=1, temperature=0.3))))
    drawn = torch.bincount(torch.tensor([step.token for step in first]), minlength=tiny.VOCAB) / rows
    logits = student.model(torch.tensor([PROMPTS[0]]), use_cache=False).logits[0, -1].detach()
    expected = (logits / 0.3).softmax(-1)
    assert ((drawn - expected).abs() < 5 * (expected / rows).sqrt() + 1e-3).all()
    assert expected.max() > 5 / tiny.VOCAB


def test_sampling_refuses_what_cannot_be():
    with pytest.raises(UserError) as error:
        Sampling(max_new_tokens=0, temperature=-1.0, top_k=-1, top_p=0.0, min_p=1.0, seed=-1)
    assert len(error.value.problems) == 6


def test_a_model_that_diverged_is_said_and_writes_nothing():
    student = tiny.student()
    with torch.no_grad():
        student.model.transformer.wte.weight[3] = math.nan
    with pytest.raises(UserError, match="not finite"):
        grown(student)


def test_a_text_ends_at_the_end_of_text():
    student = tiny.student()
    with torch.no_grad():  # the end of text becomes a probable token
        end_D = student.model.transformer.wte.weight[student.tokenizer.eot_id]
        student.model.transformer.ln_f.bias += 3 * end_D / end_D.square().sum()
    texts = grown(student, sampling=Sampling(max_new_tokens=9, seed=5))
    assert any(len(text) < 9 for text in texts)
    for text in texts:
        assert [step.is_end for step in text[:-1]] == [False] * (len(text) - 1)


def test_a_prompt_keeps_its_end_and_the_last_token_fits():
    student = tiny.student()
    long = list(range(40))
    ids, dropped = fit_prompt(long, tiny.CONTEXT, 6, student.tokenizer.eot_id)
    assert (ids, dropped) == (long[-10:], 30)
    assert len(grown(student, None, [ids])[0]) == 6
    assert fit_prompt([], tiny.CONTEXT, 6, 9) == ([9], 0)
    with pytest.raises(UserError, match="Nearest valid: 15"):
        fit_prompt(long, tiny.CONTEXT, tiny.CONTEXT, 9)


@pytest.fixture(scope="module", params=[SAEForm(k=8), SAEForm(activation="relu", normalization="none")])
def teacher_and_sae(request):
    """A random teacher that reads letters, and an autoencoder of either kind."""
    from megacocomix.config.schema import ModelConfig
    from megacocomix.model.gpt2 import GPT2, initialise

    model = GPT2(ModelConfig(**tiny.SHAPE | {"hidden_size": 24}, dropout=0.0))
    initialise(model, 1)
    sae = SAE(24, tiny.LATENTS, request.param)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
        sae.encoder.normal_(generator=generator)
        sae.decoder.copy_(torch.nn.functional.normalize(sae.encoder, dim=-1))
    return Teacher(gpt2_teacher(model), 1), sae.requires_grad_(False)


def grown_by_teacher(teacher, sae, edits=None, **options):
    from megacocomix.interpret.teacher_steering import decode_teacher

    texts = [[] for _ in PROMPTS]
    for steps in decode_teacher(teacher, sae, tiny.letters(), PROMPTS, SAMPLING, edits, **options):
        for text, step in zip(texts, steps, strict=True):
            text += [step] if step else []
    return texts


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_teacher_whose_latents_stay_as_they_are_is_the_teacher_to_the_bit(teacher_and_sae, place):
    every_latent = [[Edit(latent) for latent in range(tiny.LATENTS)]] * 3
    turned, plain = grown_by_teacher(*teacher_and_sae, every_latent, place=place), grown_by_teacher(*teacher_and_sae)
    assert tokens_of(turned) == tokens_of(plain)
    assert all(step.kl == 0 for text in turned for step in text)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_turned_latent_adds_the_difference_of_the_two_reconstructions(teacher_and_sae, place):
    teacher, sae = teacher_and_sae
    plain = grown_by_teacher(teacher, sae)
    edit = Edit(plain[0][0].kept[0][0], 8.0)
    (step, *_), *others = grown_by_teacher(teacher, sae, [[edit], [], []], place=place)
    tokens = torch.tensor(PROMPTS[:1])
    hidden = teacher.hidden(tokens)
    normed, _, scale = sae.form.normalize(hidden[:, -1:])
    index, value = sae.encode_normalized(normed)
    pre = torch.nn.functional.linear(normed - sae.pre_bias, sae.encoder, sae.latent_bias)
    changed = torch.zeros_like(pre).scatter(-1, index, value)
    changed[..., edit.concept] *= 8
    original = torch.zeros_like(pre).scatter(-1, index, value)
    hidden[:, -1:] += ((changed - original) @ sae.decoder) * scale
    expected = teacher.next_logits(tokens, lambda _: hidden)[0].log_softmax(-1)
    unsteered = teacher.logits(tokens)[0, -1].log_softmax(-1)
    assert step.kl == pytest.approx(float((expected.exp() * (expected - unsteered)).sum()), rel=1e-3)
    assert step.kl > 1e-3
    assert dict(step.kept)[edit.concept] == pytest.approx(8 * dict(plain[0][0].kept)[edit.concept], rel=1e-4)
    assert others == plain[1:]


def test_a_teacher_refuses_more_tokens_than_it_reads(teacher_and_sae):
    from megacocomix.interpret.teacher_steering import decode_teacher

    with pytest.raises(UserError, match="reads 16 at most"):
        decode_teacher(*teacher_and_sae, tiny.letters(), [[1] * 12], Sampling(max_new_tokens=5))
