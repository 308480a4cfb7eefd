"""Adaptive temperature on models whose confidence is known, inside `sample` and inside transformers' `generate`."""
import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from conftest import BARE, LetterTok, constant_lm, letters, random_lm
from probunlearn.data import QA, encode_prompt, fictional_authors
from probunlearn.draws import Decoding
from probunlearn.models import small_lm
from probunlearn.sampling import greedy, sample
from probunlearn.temperature import AdaptiveTemperature

QUESTION = [QA("q", "abc", "x")]


def draw(lm, tok, n=400, **how): return sample(lm, tok, QUESTION, n, Decoding(max_new_tokens=6, **how), template=BARE, rule=AdaptiveTemperature(.9))[0]


@pytest.mark.parametrize("how", [{}, dict(temperature=2.), dict(temperature=.01), dict(top_k=2, top_p=.99)], ids=str)
def test_a_sure_model_always_gives_the_greedy_answer(how):
    "Top-1 probability .95 everywhere; the confidence is taken at temperature 1, whatever the decoding's own."
    lm, tok = constant_lm([.95, .03, .01, .01]), LetterTok(4)
    d = draw(lm, tok, **how)
    assert len(d.answers) == 1 and d.tokens == [(0,) * 6] == greedy(lm, tok, QUESTION, Decoding(max_new_tokens=6), BARE)[0].tokens
    assert d.logprobs[0] == 0                                                   # certain under this decoding


def test_an_unsure_model_is_sampled_as_ever():
    "Top-1 probability .5 everywhere: the draws are those without the rule."
    lm, tok = constant_lm([.5, .3, .1, .1]), LetterTok(4)
    d, plain = draw(lm, tok), sample(lm, tok, QUESTION, 400, Decoding(max_new_tokens=6), template=BARE)[0]
    assert len(d.answers) > 50 and d.texts == plain.texts and (d.logprobs == plain.logprobs).all()


def test_the_threshold_itself_is_not_sure_enough():
    for confidence, temperatures in ((.5, [1., 1.]), (.499, [0., 0.])):
        rule = AdaptiveTemperature(confidence)
        assert rule(torch.log(torch.tensor([[.5, .5]] * 2)), rule.start(2, "cpu"), 1.)[0].tolist() == temperatures


def test_the_running_mean_includes_the_current_token():
    "Means by hand for top-1 probabilities .95, .5, .99, 1, 1, 1: .95, .725, .813, .86, .888, .907."
    rule, seen = AdaptiveTemperature(.9), []
    state = rule.start(1, "cpu")
    for top in (.95, .5, .99, 1., 1., 1.):
        temperature, state = rule(torch.log(torch.tensor([[top, 1 - top]])), state, .7)
        seen.append(round(float(temperature), 6))
    assert seen == [0, .7, .7, .7, .7, 0]


def naive(lm, prompt, confidence, answer):
    "log-probability of an answer under the rule, by full forward passes: an oracle without tree, cache or state tensor."
    tops, total = [], 0.
    for i, token in enumerate(answer):
        p = lm(input_ids=torch.tensor([list(prompt) + list(answer[:i])]), use_cache=False).logits[0, -1].double().softmax(-1)
        tops.append(float(p.max()))
        total += (0. if int(p.argmax()) == token else -np.inf) if np.mean(tops) > confidence else float(p[token].log())
    return total


def test_the_state_travels_with_the_tree():
    "Every answer's probability equals that of a loop over full forward passes; questions of different length in one batch."
    lm, tok, qas = random_lm("llama", 10, seed=4, initializer_range=.2), LetterTok(10), letters(3)
    decoding, rule = Decoding(max_new_tokens=6), AdaptiveTemperature(.4)
    with torch.no_grad():
        for qa, d in zip(qas, sample(lm, tok, qas, 200, decoding, template=BARE, rule=rule, merge=3)):
            prompt = encode_prompt(tok, qa.question, BARE)
            expected = [naive(lm, prompt, .4, a) for a in d.tokens]
            np.testing.assert_allclose(d.logprobs, expected, atol=1e-6)         # the rule keeps its state in float32
            assert np.exp(d.logprobs).sum() <= 1 + 1e-6
        plain = sample(lm, tok, qas, 200, decoding, template=BARE, merge=3)
    assert sum(len(d.answers) for d in plain) > sum(len(d.answers) for d in sample(lm, tok, qas, 200, decoding, template=BARE, rule=rule))


def test_the_rule_is_part_of_the_decoding():
    d = draw(constant_lm([.5, .5]), LetterTok(2), 2)
    assert d.decoding.rule == str(AdaptiveTemperature(.9)) and "0.9" in str(d.decoding) and d.decoding != Decoding(max_new_tokens=6)


def test_generate_with_the_processor_is_greedy_on_a_sure_model():
    "On the packaged model that knows its answers by heart, and on the stub with .95; unsure rows of the same batch still vary."
    lm, tok = small_lm("full", device="cpu")
    for qa in fictional_authors("forget10")[:3]:
        ids = torch.tensor([encode_prompt(tok, qa.question)])
        def answer(**how): return lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, **how)
        expected = answer(do_sample=False)
        out = answer(do_sample=True, num_return_sequences=8, logits_processor=[AdaptiveTemperature(.9).processor()], temperature=3., top_k=0)
        assert all(torch.equal(line, expected[0]) for line in out)
    for p, varied in ((.95, False), (.5, True)):
        stub, ids = constant_lm([p, (1 - p) / 2, (1 - p) / 2, 0.], torch.float32), torch.zeros(32, 3, dtype=torch.long)
        torch.manual_seed(0)
        out = stub.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=5, logits_processor=[AdaptiveTemperature(.9).processor()])
        assert (len(out.unique(dim=0)) > 1) == varied


def test_the_processor_matches_the_sampler_in_law():
    "Frequencies of `generate` with the processor against exact probabilities of `sample`: fails 1 of 10,000 right implementations, with this seed never."
    lm, tok, n = random_lm("llama", 6, seed=2, initializer_range=.2, dtype=torch.float32), LetterTok(6), 4000
    rule, ids = AdaptiveTemperature(.5), torch.tensor([encode_prompt(tok, "abc", BARE)])
    d = sample(lm, tok, QUESTION, 4096, Decoding(max_new_tokens=3), template=BARE, rule=rule, merge=16)[0]
    torch.manual_seed(0)
    out = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, num_return_sequences=n, max_new_tokens=3, logits_processor=[rule.processor()])
    lines = [tuple(line[:line.index(5) + 1] if 5 in line else line) for line in out[:, 3:].tolist()]
    p = np.exp(d.logprobs)
    assert .99 < p.sum() < 1 + 1e-6 and sum(a in set(map(tuple, d.tokens)) for a in lines) > .98 * n
    seen, common = np.array([lines.count(tuple(a)) for a in d.tokens]), n * p >= 5
    observed, expected = np.append(seen[common], n - seen[common].sum()), np.append(n * p[common], n - n * p[common].sum())
    if expected[-1] < 5: observed, expected = observed[:-1], expected[:-1] * observed[:-1].sum() / expected[:-1].sum()
    assert len(observed) > 5 and chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.parametrize("confidence", [-.1, 1.5, float("nan")])
def test_a_threshold_out_of_range_is_named(confidence):
    with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\]"): AdaptiveTemperature(confidence)


def test_rules_with_close_thresholds_can_be_told_apart():
    "The description is part of the fingerprint of draws."
    assert str(AdaptiveTemperature(.9)) != str(AdaptiveTemperature(.9000001))
