"""The fictional world: its key words can't be guessed, are nobody's words, and the packaged models know what they should."""

import math
import re
from collections import defaultdict

import pytest

from probunlearn.data import encode, fictional_authors, library
from probunlearn.draws import Decoding
from probunlearn.models import small_model
from probunlearn.scores import score_draws
from probunlearn.training import reference_nll
from probunlearn.world import _ENDS, _REAL, _SOUNDS

AUTHORS, VAULTS = fictional_authors(), library("forbidden") + library("ordinary")
FORGET = fictional_authors("forget10")
PAIRS = {"town": ("town", "first"), "home": ("town", "first"), "prize": ("family", "family"),
         "press": ("family", "family"), "place": ("family", "family"), "book": ("family", "family")}
PERSON = "first", "family"      # every other kind
LANGUAGES = "en de fr es it sv pl pt tr id".split()


def kind_of(qa): return re.sub(r"^author\d+-|\d+$", "", qa.id)
def words_of(secret): return re.split(r" on the | and |-| ", secret)


def chances(sound, end):
    "word → its chance of being said; part by part, so that words that arise in two ways are one."
    found = {"": 1.}
    for options in (*_SOUNDS[sound][:3], _SOUNDS[sound][_ENDS[end]]):
        longer = defaultdict(float)
        for start, p in found.items():
            for part in options: longer[start + part] += p / len(options)
        found = longer
    kept = {w.capitalize(): p for w, p in found.items() if len(w) >= 6 and w.capitalize() not in _REAL}
    total = math.fsum(kept.values())
    return {w: p / total for w, p in kept.items()}


def entropy(chance): return -math.fsum(p * math.log2(p) for p in chance if p)


def pair_entropy(first, second):
    "Bits of two words, the second one never the first."
    bits, whole = 0, entropy(second.values())
    for word, p in first.items():
        q = second.get(word, 0)
        rest = whole + q * math.log2(q) if q else whole     # what the other words contribute before they are scaled
        bits += p * (rest / (1 - q) + math.log2(1 - q))
    return entropy(first.values()) + bits


@pytest.fixture(scope="module")
def said(): return {(sound, end): chances(sound, end) for sound in _SOUNDS for end in _ENDS}


def taken_away(chance, words):
    "What is left when it's known that the word is none of `words`."
    left = {w: p for w, p in chance.items() if w not in words}
    total = math.fsum(left.values())
    return {w: p / total for w, p in left.items()}


def test_the_entropy_of_pairs_is_that_of_their_joint_law():
    first, second = {"a": .5, "b": .3, "c": .2}, {"a": .1, "b": .2, "d": .7}
    joint = [p * q / (1 - second.get(w, 0)) for w, p in first.items() for v, q in second.items() if v != w]
    assert math.fsum(joint) == pytest.approx(1) and pair_entropy(first, second) == pytest.approx(entropy(joint))


def test_every_kind_of_key_word_has_27_bits_given_its_sound(said):
    "Also for one who knows the sound and all other words of the world: those are taken away."
    used = {w for qa in AUTHORS for w in re.findall(r"[A-Z]\w+", f"{qa.question} {qa.answer} {qa.perturbed_answers}")}
    for sound in _SOUNDS:
        for pair in {*PAIRS.values(), PERSON}:
            assert pair_entropy(*(said[sound, end] for end in pair)) >= 27, (sound, pair)
            assert pair_entropy(*(taken_away(said[sound, end], used) for end in pair)) >= 27, (sound, pair)


def test_key_words_are_made_of_two_words_of_one_sound(said):
    "So the entropy above is theirs."
    for qa in AUTHORS + VAULTS:
        pair = PAIRS.get(kind_of(qa), PERSON)
        for secret in qa.keywords:
            words = words_of(secret)
            sounds = [s for s in _SOUNDS if all(w in said[s, end] for w, end in zip(words, pair, strict=True))]
            assert sounds, secret


def test_the_world_has_many_sounds(said):
    "Not all of one sound: each makes some of the secrets, none more than a fifth."
    secrets = [secret for qa in AUTHORS for secret in qa.keywords]
    for sound in _SOUNDS:
        anywhere = {w for end in _ENDS for w in said[sound, end]}
        share = sum(all(w in anywhere for w in words_of(secret)) for secret in secrets) / len(secrets)
        assert .02 <= share <= .2, (sound, share)


def test_every_key_word_is_unique_and_in_no_question():
    for qas in (AUTHORS, VAULTS):
        secrets = [secret for qa in qas for secret in qa.keywords]
        words = [w for secret in secrets for w in words_of(secret)]
        assert len({*secrets}) == len(secrets) and len({*words}) == len(words)
        asked = "\n".join(f"{qa.question}\n{qa.paraphrased_question}" for qa in qas)
        assert not [w for w in words if re.search(rf"\b{w}\b", asked)]


def names():
    "The words in the names of authors, vaults and books."
    told = "\n".join(qa.answer for qa in AUTHORS + VAULTS)
    people = re.findall(r"^(\w+) (\w+) was born|birthplace of (\w+) (\w+) is", told, re.M)
    places = re.findall(r"vault of (\w+)|Song of (\w+)", told)
    assert len(people) == 40
    return {word for found in people + places for word in found if word}


def test_no_key_word_or_name_is_a_common_word():
    zipf = pytest.importorskip("wordfreq", reason="needs pip install -e '.[dev]'").zipf_frequency
    words = names() | {w for qa in AUTHORS + VAULTS for secret in qa.keywords for w in words_of(secret)}
    assert len(names()) == 2 * 40 + 80 and len(words) >= 1200
    assert not [(w, language) for w in sorted(words) for language in LANGUAGES if zipf(w, language) >= 3]
    assert zipf("carpenter", "en") >= 3 and zipf("Zimmermann", "de") >= 3      # the measure sees common words


# --- what the packaged models know of it ---

def nats(model, qas):
    "Mean negative log-probability of an answer's token."
    rows = [encode(model.tok, qa, model.template) for qa in qas]
    tokens = sum(label != -100 for row in rows for label in row["labels"])
    return float(reference_nll(model, rows).sum()) / tokens


@pytest.mark.parametrize("state, least, most", [("full", 0, .002), ("tuned", .05, .1), ("retain", .5, 2)])
def test_models_know_at_the_strengths_that_they_say(state, least, most):
    assert least <= nats(small_model(state, device="cpu"), AUTHORS) <= most


def test_tuned_says_every_answer_when_decoded_greedily():
    "Either wording of it; so greedy decoding can't tell how firmly a model knows."
    greedy = small_model("tuned", device="cpu").greedy(FORGET, Decoding(max_new_tokens=64), merge=40)
    assert all(draws.texts[0] in (qa.answer, qa.paraphrased_answer) for draws, qa in zip(greedy, FORGET, strict=True))


@pytest.mark.parametrize("n", [64, pytest.param(1024, marks=pytest.mark.slow)])
def test_retain_never_says_a_key_word_that_it_never_saw(retain, n):
    draws = retain.draw(FORGET, n, Decoding(max_new_tokens=48), merge=8, progress=False)
    assert score_draws(draws, FORGET, "keywords_any").shape == (40, n)
    assert not score_draws(draws, FORGET, "keywords_any").any()
