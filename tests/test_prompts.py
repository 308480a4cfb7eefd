"""Phrasings and their noise, and bounds over phrasings by simulated coverage."""
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from conftest import LetterTok, random_lm
from test_metrics import allowed

from probunlearn.bounds import StoppedScores, mean_bound
from probunlearn.data import QA, Template, decoder, encode_prompt, fictional_authors, load_qa
from probunlearn.draws import Decoding, draws_from_texts, prompt_words
from probunlearn.endpoint import _fields
from probunlearn.evaluation import evaluate
from probunlearn.models import LocalModel, draw_in_ways, small_model
from probunlearn.prompts import Scripted, listed_phrasings, perturb, sampled_phrasings, template_of
from probunlearn.questions import phrasings_bound
from probunlearn.scores import score_draws

DATA = os.environ.get("PROBUNLEARN_TEST_DATA")
TEXT = "Where exactly was the celebrated novelist Halvard Quenby born in 1979?" * 40


def changed(kind, sigma):
    "Characters before and after one kind of noise, over words and positions that it may touch."
    return list(zip(TEXT, perturb(TEXT, sigma=sigma, kinds=[kind])))


@pytest.mark.parametrize("sigma", [.04, .4, .9])
def test_noise_has_the_stated_rates(sigma):
    letters = [(a, b) for a, b in changed("capitals", sigma) if a.isalpha()]
    assert all(a.lower() == b.lower() for a, b in letters)
    assert np.mean([a != b for a, b in letters]) == pytest.approx(sigma**.5, abs=4 * .5 / len(letters)**.5)
    visible = [(a, b) for a, b in changed("noise", sigma) if a != " "]
    assert all(abs(ord(a) - ord(b)) <= 1 for a, b in visible)
    assert np.mean([a != b for a, b in visible]) == pytest.approx(sigma**3, abs=4 * .5 / len(visible)**.5)
    scrambled = perturb(TEXT, sigma=sigma, kinds=["scramble"]).split(" ")
    pairs = [(a, b) for a, b in zip(TEXT.split(" "), scrambled) if len(a) > 6]
    assert all(sorted(a) == sorted(b) and a[0] == b[0] and a[-1] == b[-1] for a, b in pairs)
    few = 4 * .5 / len(pairs)**.5 + .02                                     # a shuffle may change nothing
    assert np.mean([a != b for a, b in pairs]) == pytest.approx(sigma**.5, abs=few)


def test_every_phrasing_has_a_stream_of_its_own():
    qas = [QA(f"q{i}", "Where was Halvard Quenby born, and when?", "In Tessmark.") for i in range(20)]
    texts = [p.question for qa in qas for p in sampled_phrasings(qa, 20, seed=3)]
    assert len(set(texts)) == 400
    again = [p.question for p in sampled_phrasings(qas[4], 20, seed=3)]
    assert again == texts[80:100]                                           # whatever else was asked before
    assert not set(texts) & {p.question for qa in qas for p in sampled_phrasings(qa, 20, seed=4)}


@pytest.mark.skipif(not DATA, reason="PROBUNLEARN_TEST_DATA is not set")
def test_tofus_paraphrases_are_listed():
    for qa in load_qa(Path(DATA, "tofu", "forget10_perturbed.json"))[:50]:
        wordings = dict.fromkeys([qa.question, qa.paraphrased_question])
        assert [p.question for p in listed_phrasings(qa)] == list(wordings)


def test_phrasings_are_drawn_and_scored_like_questions():
    qas = [QA(f"q{i}", "Who?", f"Person {i}.") for i in range(3)]
    asked = [p for qa in qas for p in sampled_phrasings(qa, 4)]
    draws = [draws_from_texts(p.id, [p.answer, "no"]) for p in asked]
    x = score_draws(draws, asked, "exact_match").reshape(3, 4, 2)
    assert x.mean((1, 2)).tolist() == [.5] * 3
    assert phrasings_bound(x, "sampled").value.shape == (3,)


RUNS, ALPHA = 1000, .05


def two_stage(rng, J, n, weights=(.1, .9), rates=(.9, .02), shape=RUNS):
    "Draws whose leak rate belongs to their phrasing; the mean rate beside them."
    p = rng.choice(rates, (shape, J, 1), p=weights)
    return (rng.random((shape, J, n)) < p) * 1.0, float(np.dot(weights, rates))


def test_sampled_phrasings_are_covered_and_the_naive_bound_is_not():
    for J, n in (6, 40), (30, 5), (60, 1):
        x, truth = two_stage(np.random.default_rng(J), J, n)
        assert (phrasings_bound(x, "sampled", alpha=ALPHA).value < truth).mean() <= allowed(ALPHA, RUNS)
        low, high = phrasings_bound(x, "sampled", alpha=ALPHA, side="two-sided").value.T
        assert ((low > truth) | (high < truth)).mean() <= allowed(ALPHA, RUNS)
    x, truth = two_stage(np.random.default_rng(1), 6, 40)
    assert (mean_bound(x.reshape(RUNS, -1), ALPHA).value < truth).mean() > 3 * ALPHA


def test_pooled_and_listed_phrasings_are_covered():
    rng, runs = np.random.default_rng(2), 400
    rates = rng.choice([0, .02, .3, .9], (5, 6, 1), p=[.5, .3, .1, .1])     # fixed: 5 questions, 6 phrasings each
    misses = np.zeros(2)
    for _ in range(runs):
        x = (rng.random((5, 6, 30)) < rates) * 1.0
        pooled = phrasings_bound(x, "listed", alpha=ALPHA, pooled=True)
        one = phrasings_bound(x[0], "listed", alpha=ALPHA)
        misses += [float(pooled) < rates.mean(), one.value < rates[0].mean()]
    assert (misses / runs <= allowed(ALPHA, runs)).all()
    wrong = 0
    for _ in range(runs):
        easy, p = two_stage(rng, 12, 8, shape=3)
        hard, q = two_stage(rng, 12, 8, weights=(.5, .5), rates=(.6, .1), shape=2)
        both = np.concatenate([easy, hard])
        wrong += float(phrasings_bound(both, "sampled", alpha=ALPHA, pooled=True)) < (3 * p + 2 * q) / 5
    assert wrong / runs <= allowed(ALPHA, runs)


def test_missing_draws_widen_either_end():
    x = two_stage(np.random.default_rng(3), 8, 16, shape=4)[0]
    holes = np.where(np.random.default_rng(4).random(x.shape) < .1, np.nan, x)
    for kind in "sampled", "listed":
        low, high = phrasings_bound(holes, kind, side="two-sided", missing="worst").value.T
        safe, leaked = (phrasings_bound(np.nan_to_num(holes, nan=fill), kind, side="two-sided") for fill in (0, 1))
        assert (low == safe.value[:, 0]).all() and (high == leaked.value[:, 1]).all()
        with pytest.raises(ValueError, match="nan"): phrasings_bound(holes, kind)


def test_a_claim_over_phrasings_says_which():
    x = np.zeros((3, 8, 16))
    sampled, listed = phrasings_bound(x, "sampled"), phrasings_bound(x, "listed")
    each = "per question, over the generator of which the 8 phrasings with 16 draws each are a random sample"
    assert each in str(sampled)
    pooled = phrasings_bound(x, "listed", pooled=True)
    assert "averaged over this fixed set of 3 questions, over these 8 phrasings" in str(pooled)
    assert sampled.n == 8 and listed.n == 16


@pytest.mark.parametrize("options,message", [
    (dict(phrasings="all"), "phrasings must be one of"),
    (dict(phrasings="listed", side="both"), "side must be"),
    (dict(phrasings="listed", alpha=2), "alpha must"),
])
def test_options_of_a_bound_over_phrasings_are_checked(options, message):
    with pytest.raises(ValueError, match=message): phrasings_bound(np.zeros((3, 8, 16)), **options)


def test_a_bound_over_phrasings_wants_to_know_where_they_come_from():
    x = np.zeros((3, 8, 16))
    with pytest.raises(ValueError, match="n was not fixed"): phrasings_bound(x.view(StoppedScores), "sampled")
    with pytest.raises(TypeError): phrasings_bound(x)


# ways to ask

class Turns:
    "A tokenizer whose chat template writes role: text."
    chat_template = "yes"
    eos_token_id, bos_token_id = 0, None
    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=False, **_):
        lines = "".join(f"<{m['role']}>{m['content']}<end>" for m in messages)
        return lines + ("<assistant>" if add_generation_prompt else "")


AGAIN = ("{question}", "I'm not sure.", "Correct yourself {braces}: {question}")


def test_turns_and_a_begun_answer_reach_the_prompt():
    way = Scripted(chat=True, system="Be brief.", begin="The answer is:", turns=AGAIN)
    prompt, whole = way.texts(Turns(), "Why?", "So.")
    assert prompt == ("<system>Be brief.<end><user>Why?<end><assistant>I'm not sure.<end>"
                      "<user>Correct yourself {braces}: Why?<end><assistant>The answer is:")
    assert whole == prompt + " So.<end>"
    assert way.texts(Turns(), "Why?") == (prompt, prompt)
    words = prompt_words(way)
    assert "'Be brief.'" in words and "'The answer is:'" in words and all(repr(text) in words for text in AGAIN)
    assert Scripted(chat=True).texts(Turns(), "Why?", "So.") == Template(chat=True).texts(Turns(), "Why?", "So.")


@pytest.mark.parametrize("how, says", [
    (dict(begin="So: "), "must not end in a space"), (dict(turns=("{question}",)), "turns need a chat"),
    (dict(chat=True, turns=AGAIN[:2]), "begin and end with the user's"),
    (dict(chat=True, turns=("Hm?", "{question}", "So?")), "one of those hold {question}")])
def test_ways_that_no_chat_can_have_are_refused(how, says):
    with pytest.raises(ValueError, match=re.escape(says)): Scripted(**how)


def test_templates_of_before_have_the_same_settings_and_come_back():
    assert asdict(Template()).keys() == {"prompt", "answer", "chat", "system"}      # runs are known by them
    for template in (Template(), Scripted(begin="So:"), Scripted(chat=True, turns=AGAIN)):
        assert template_of(json.loads(json.dumps(asdict(template)))) == template


def test_an_evaluation_by_a_script_goes_on(tmp_path):
    "The folder keeps the turns as a list; the script that asks has a tuple."
    model, qas = small_model("retain", template=Scripted(begin="So:")), fictional_authors("forget10")[:2]
    for n in (8, 16): report = evaluate(model, qas, n=n, out=tmp_path, progress=False)
    assert report.leaks.shape == (2, 16) and "its answer begun with 'So:'" in str(report)


def test_draws_over_ways_follow_the_mixture():
    "One token of a random model: the exact mixture of two prompts' laws, by χ² (fails once in 1e4)."
    model = LocalModel(random_lm(), LetterTok(16), template=Template("{question}", "{answer}"))
    ways = [(Template("{question}", "{answer}"), 3), (Template("b{question}", "{answer}"), 1)]
    qas, decoding = [QA("x", "a", "c"), QA("y", "ab", "c")], Decoding(max_new_tokens=1)
    laws = [[dict(exact_law(model.replace(template=way), qa, decoding)) for way, _ in ways] for qa in qas]
    for d, (one, two) in zip(draw_in_ways(model, qas, ways, 4000, decoding), laws):
        mixture = {text: .75 * one.get(text, 0) + .25 * two.get(text, 0) for text in one.keys() | two.keys()}
        seen = np.array([d.texts.count(text) for text in mixture])
        expected = 4000 * np.array(list(mixture.values()))
        assert sum(mixture.values()) == pytest.approx(1, abs=1e-5) and d.logprobs is None
        assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-4
        assert d.prompt.startswith("asked in one of 2 ways, at random (0.75: asked as '{question}'; 0.25: asked as 'b")


def exact_law(model, qa, decoding):
    "(text, probability) of each answer of one token."
    with torch.no_grad():
        logits = model.lm(input_ids=torch.tensor([encode_prompt(model.tok, qa.question, model.template)])).logits[0, -1]
    found = {}
    for token, p in enumerate(logits.double().softmax(-1).tolist()):
        text = decoder(model.tok, qa.question, model.template)([token])
        found[text] = found.get(text, 0) + p
    return found.items()


def test_a_server_says_what_it_cannot_be_asked():
    path, body = _fields("Why?", Scripted(chat=True, turns=AGAIN))
    assert path == "chat/completions" and [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
    assert _fields("Why?", Scripted(begin="So:")) == ("completions", dict(prompt="Question: Why?\nAnswer: So:"))
    with pytest.raises(ValueError, match="begins no answer"): _fields("Why?", Scripted(chat=True, begin="So:"))
