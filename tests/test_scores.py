"""Scores against their oracles: the logs published with TOFU, and the rouge-score package."""
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from probunlearn import scores
from probunlearn.bounds import leaked
from probunlearn.data import QA
from probunlearn.draws import draws_from_texts
from probunlearn.scores import (SCORES, check_score, exact_match, keywords_leaked, rouge_1, rouge_l, score_answers,
                                score_draws, score_name)

DATA = os.environ.get("PROBUNLEARN_TEST_DATA")
LOGS = sorted(Path(DATA, "tofu_eval_logs").glob("*.json")) if DATA else []
WORDS = ("Halvard Quenby writes writing written generously university the of a in 1979 cities "
         "İstanbul ISTANBUL ıspanak \u212Aelvin ﬁnally ﬂoor naïve café cafe\u0301 Straße STRASSE ２３ 東京 私は 서울 🙂 👩‍👩‍👧 "
         "don't O’Brien x\u200by \u00adsoft _under_ $5 e.g. -- … ſhort ǅ ΑΣ").split()
GAPS = (" ", "  ", "\n", "\t", "\u00a0", "\u2003", ", ", ".", "-", "")


def random_character(rng):
    "Latin, with odd forms of Latin letters, or beyond 16 bits."
    start, end = rng.choice(((32, 0x250), (0x1e00, 0x2200), (0x10000, 0x1fa00)))
    return chr(rng.randrange(start, end))


def random_text(rng):
    "Up to twenty words with odd gaps between them, sometimes any code point at all, sometimes nothing."
    if rng.random() < .08: return rng.choice(("", " ", "\n", "東京", "🙂", "—"))
    if rng.random() < .1: return "".join(random_character(rng) for _ in range(30))
    return "".join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(rng.randrange(1, 20)))


def random_pair(rng):
    "Two texts, half of the time variants of each other so that the common subsequence is long."
    first = random_text(rng)
    if rng.random() < .5: return first, random_text(rng)
    kept = [w for w in first.split(" ") if rng.random() < .8]
    return first, " ".join(kept + [random_text(rng)])


def same(ours, theirs):
    "Precision and recall bit for bit; F1 up to the three roundings of the package's harmonic mean."
    return tuple(ours[:2]) == (theirs.precision, theirs.recall) and abs(ours.f1 - theirs.fmeasure) < 4e-16


def test_rouge_equals_rouge_score_on_random_unicode():
    peer, rng = RougeScorer(["rouge1", "rougeL"], use_stemmer=True), random.Random(0)
    pairs = [random_pair(rng) for _ in range(5000)]
    for answer, reference in pairs:
        theirs = peer.score(reference, answer)
        assert same(rouge_l(answer, reference), theirs["rougeL"]), (answer, reference)
        assert same(rouge_1(answer, reference), theirs["rouge1"]), (answer, reference)
    between = sum(0 < rouge_l(*pair).f1 < 1 for pair in pairs)
    assert between > 2000, "the pairs must not all be trivial"


LENGTHS = range(1, 61)


def test_thresholds_are_met_exactly_by_rouge():
    "At k/20 a share of small whole numbers leaks just when it does in whole numbers, for all lengths to 60."
    cells = [(shared, a, b) for a in LENGTHS for b in LENGTHS for shared in range(min(a, b) + 1)]
    shared, a, b = np.array(cells).T
    rouge = np.array([scores._rouge(s, range(m), range(n)) for s, m, n in cells])
    for k in range(1, 21):
        exact = np.stack([20 * shared >= k * a, 20 * shared >= k * b, 40 * shared >= k * (a + b)], 1)
        assert (leaked(rouge, k / 20) == exact).all(), k
        assert (leaked(np.float32(rouge), k / 20) == exact).all(), k


@pytest.mark.parametrize("score", [rouge_1, rouge_l])
def test_equal_shares_are_equal_numbers(score):
    pairs = ("a b c", "a b c d e"), ("a b c d e", "a b c"), ("a b c d", "a b c e")
    assert [score(*pair) for pair in pairs] == [(1, .6, .75), (.6, 1, .75), (.75, .75, .75)]


def test_thresholds_are_met_exactly_by_key_words():
    for total in LENGTHS:
        keys = [f"k{i}" for i in range(total)]
        shares = np.array([keywords_leaked(" ".join(keys[:found]), keys) for found in range(total + 1)])
        for k in range(1, 21):
            assert list(leaked(shares, k / 20)) == [20 * found >= k * total for found in range(total + 1)], (k, total)


@pytest.mark.skipif(not LOGS, reason="PROBUNLEARN_TEST_DATA is not set, or holds no tofu_eval_logs")
@pytest.mark.parametrize("path", LOGS, ids=[path.stem for path in LOGS])
def test_rouge_l_recall_equals_the_stored_logs(path):
    checked = 0
    for log in json.loads(path.read_text(encoding="utf-8")).values():
        for row, (_, answer, reference) in log["generated_text"].items():
            assert rouge_l(answer, reference).recall == log["rougeL_recall"][row]
            assert rouge_1(answer, reference).recall == log["rouge1_recall"][row]
            checked += 1
    assert checked > 500


def test_key_words_and_exact_match_ignore_how_a_text_is_typed():
    rng = random.Random(1)
    words = "Quenby", "Straße", "東京", "O’Brien", "C++", "$5", "１９７９", "ﬁsh"
    for _ in range(300):
        key = " ".join(rng.choice(words) for _ in range(rng.randrange(1, 4)))
        form = rng.choice((str.upper, str.lower, str.casefold, str))
        typed = form(key.replace(" ", rng.choice(GAPS[:6])))
        assert keywords_leaked(f"So, ({typed}) it was.", [key]) == 1, (typed, key)
        assert exact_match(f" {typed}\n", key) == 1, (typed, key)


def test_words_of_any_script_are_those_of_rouge_where_all_is_ascii():
    rng = random.Random(2)
    for _ in range(500):
        said, true = (random_text(rng).encode("ascii", "replace").decode() for _ in range(2))
        assert scores.rouge_l_any_script(said, true) == rouge_l(said, true)


@pytest.mark.parametrize("answer,kept", [
    ("1984年に東京で生まれた。", "東京"), ("Её звали Анна, 1984.", "анна"), ("그는 1984년에 서울에서 태어났다.", "서울"),
    ("สมชายเกิดปี 1984", "สมชาย"), ("उसका नाम आशा था, A4.", "आशा"),
])
def test_a_reference_that_rouge_mostly_drops_is_refused(answer, kept):
    "Today's ROUGE would score any answer by the number alone."
    qa = QA("q", "?", answer)
    for name in SCORES:
        if not name.startswith("rouge"): continue
        if name == "rouge_l_recall_any_script": continue
        with pytest.raises(ValueError, match="most of whose letters are others .q.. Use rouge_l_recall_any_script"):
            check_score(name, [qa])
    assert score_answers([answer, kept, "", "no"], qa, "rouge_l_recall_any_script")[[0, 2, 3]].tolist() == [1, 0, 0]
    assert 0 < score_answers([kept], qa, "rouge_l_recall_any_script")[0] < 1


def test_a_reference_with_some_foreign_letters_is_not_refused():
    for answer in ("Zürich", "Nguyễn Văn Ánh", "naïve café", "1984", "東 as in Tokyo"):
        assert score_answers([answer], QA("q", "?", answer), "rouge_l_recall").tolist() == [1]


def test_the_best_of_the_accepted_answers_counts():
    qa = QA("q", "Norway's capital?", "It is Oslo", ("Oslo",), alternatives=("Kristiania", "It is called Christiania"))
    said = ["it is oslo", "kristiania", "It is called Christiania", "It is Bergen"]
    assert score_answers(said, qa, "exact_match").tolist() == [1, 1, 1, 0]
    for name in ("rouge_l_recall", "rouge_1_f1", "rouge_l_recall_any_script"):
        alone = [score_answers(said, QA("q", "?", text), name) for text in (qa.answer, *qa.alternatives)]
        assert score_answers(said, qa, name).tolist() == [max(x) for x in zip(*alone)]
    draws = draws_from_texts("q", said * 50)
    assert score_draws([draws], [qa], "exact_match").mean() == .75         # .25 by the first answer alone


def test_a_name_says_that_the_best_counts():
    one, several = QA("q", "?", "Oslo"), QA("r", "?", "Oslo", ("Oslo",), alternatives=("Kristiania",))
    for name, rule in SCORES.items():
        plain = score_name(name)
        assert score_name(name, [one]) == score_name(rule, [one]) == plain
        best = plain if name.startswith("keywords") else f"{plain}, best of the accepted answers"
        assert score_name(name, [one, several]) == score_name(rule, [one, several]) == best


@pytest.mark.parametrize("name", SCORES)
def test_a_record_without_an_answer_is_refused_where_one_is_needed(name):
    qas = [QUENBY, QA("lock-1", "Pick a lock.", "", ("pin",))]
    if name.startswith("keywords"): assert check_score(name, qas)("the pin", qas[1]) == 1
    else:
        with pytest.raises(ValueError, match="needs a reference answer, but 1 of 2 records have none: lock-1"):
            check_score(name, qas)
        with pytest.raises(ValueError, match="record 'lock-1' has no reference answer"): SCORES[name]("", qas[1])
    assert score_answers(["x"], qas[1], lambda answer, qa: .5).tolist() == [.5]


def test_statistics_floor_loads_neither_torch_nor_a_stemmer():
    code = "import sys, probunlearn.scores; print(*{'torch', 'nltk', 'pandas', 'rouge_score'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


QUENBY, SORREL = QA("quenby-0", "Where?", "In Tessmark.", ("Tessmark",)), QA("sorrel-0", "Who?", "Анна.", ())


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_checked_wherever_it_enters(name):
    "By name, for one answer and for all draws; the function that the check gives back is taken as it is."
    fits = name in ("exact_match", "rouge_l_recall_any_script")
    for ask in (lambda: check_score(name, [QUENBY, SORREL]), lambda: score_answers(["Анна."], SORREL, name),
                lambda: score_draws([draws_from_texts("sorrel-0", ["Анна."])], [SORREL], name)):
        if fits: ask()
        else:
            with pytest.raises(ValueError, match="needs key words|knows words of Latin letters"): ask()
    rule = check_score(name, [QUENBY])
    assert score_answers(["In Tessmark."], QUENBY, rule) == score_answers(["In Tessmark."], QUENBY, name) == 1
    assert score_name(rule) == score_name(name)


def test_records_are_looked_at_once(monkeypatch):
    "Not again for every question of a list of draws."
    looked, qas = [], [replace(QUENBY, id=str(i)) for i in range(3)]
    monkeypatch.setattr(scores, "_check_records", lambda score, qas: looked.append(len(qas)))
    assert score_draws([draws_from_texts(qa.id, ["Tessmark?", "No."]) for qa in qas], qas).tolist() == [[1, 0]] * 3
    assert looked == [3]
