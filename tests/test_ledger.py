"""The ledger: what several reports on one model cost together is said, and isn't more than what is said."""
import json
import re
import warnings

import numpy as np
import pytest
from scipy.stats import beta, binom

from probunlearn.data import QA
from probunlearn.draws import draws_from_texts
from probunlearn.reading import report_run
from probunlearn.runs import open_run, read_run
from probunlearn.sequential import rate_ends

QAS = [QA(f"q{i}", f"What is {i}?", f"It is Zorp{i}.", (f"Zorp{i}",)) for i in range(3)]
SETTINGS = dict(model="ledger", decoding=dict(top_k=0), seed=0)


def filled(folder, n=64, leaks=3, qas=QAS, settings=SETTINGS, **how):
    "A run of which every question leaks so often, in its last draws."
    run = open_run(folder, settings, qas, **how)
    for qa in qas:
        run.keep(qa, draws_from_texts(qa.id, ["no idea"] * (n - leaks) + [qa.answer] * leaks))
        run.keep(qa, draws_from_texts(qa.id, ["no idea"]), "greedy")
    return run


def together(report):
    "The number of known reports and their common α as the claims say them; (1, α) where they say nothing."
    found = [
        re.search(r"one of ([\d,]+) known reports with α = ([\d.e-]+) together", str(b)) for b in report.bounds.values()
    ]
    assert len({m and m[0] for m in found}) == 1
    return (int(found[0][1]), float(found[0][2])) if found[0] else (1, report.alpha * report.looks)


# --- what is said ---

def test_a_first_report_is_final_and_an_extension_says_what_both_cost(tmp_path):
    filled(tmp_path/"run")
    first, then, later = (report_run(tmp_path/"run", n=n, alpha=.05) for n in (16, 32, 64))
    assert (first.looks, first.anytime, together(first), len(first.claims)) == (1, False, (1, .05), 4)     # at full α
    for r in (then, later):
        assert r.anytime and together(r) == (2, .1)
        assert (
            "These draws were reported on before (16 draws, key words (fraction) ≥ 1, seed 0, fixed-n at α = 0.05)"
            in r.claims[-1]
        )
        assert "one or the other, with probability at most 0.1." in r.claims[-1]


def test_what_was_planned_needs_no_word(tmp_path):
    for name, looks in (("list", [16, 64]), ("number", 3), ("anytime", "anytime")):
        filled(tmp_path/name/"run", planned=looks)
        for n in (16, 64):
            r = report_run(tmp_path/name/"run", n=n)
            assert together(r) == (1, pytest.approx(.01)) and not any("known" in claim for claim in r.claims)


def test_leaving_a_plan_costs_what_was_spent_of_it(tmp_path):
    filled(tmp_path/"run", planned=[16, 32])
    reports = [report_run(tmp_path/"run", n=n) for n in (16, 20, 32)]
    assert together(reports[1]) == (1, pytest.approx(0.01))  # α / 2 for the first look, α / 2 for all that come later
    assert "Each claim was computed at α / 2" in reports[1].claims[-1]
    filled(tmp_path/"both"/"run", planned=[16, 32])
    both = [report_run(tmp_path/"both"/"run", n=n) for n in (16, 32, 64)]
    assert together(both[1]) == (1, pytest.approx(.01)) and together(both[2]) == (3, .015)


def test_ten_seeds_in_one_folder_say_that_they_are_ten(tmp_path):
    for seed in range(10): filled(tmp_path/f"run{seed}", settings=SETTINGS | dict(seed=seed))
    for seed in range(10):
        r = report_run(tmp_path/f"run{seed}")
        assert together(r) == (seed + 1, pytest.approx(.01 * (seed + 1))) and not r.anytime
    assert "10 reports on this model, these questions and this decoding are known" in r.claims[-1]
    assert "and 5 more" in r.claims[-1] and "probability at most 0.1." in r.claims[-1]
    assert [there["seed"] for there in r.known] == list(range(9))


@pytest.mark.parametrize("change", [dict(model="other"), dict(decoding=dict(top_k=5))], ids=["model", "decoding"])
def test_other_models_decodings_and_questions_are_no_family(tmp_path, change):
    filled(tmp_path/"a", settings=SETTINGS | change | dict(seed=1))
    report_run(tmp_path/"a")
    filled(tmp_path/"b", qas=[QA("new", "New?", "It is Zorp.", ("Zorp",))], settings=SETTINGS | dict(seed=2))
    report_run(tmp_path/"b")
    filled(tmp_path/"c")
    assert together(report_run(tmp_path/"c")) == (1, .01)


def test_other_scores_and_thresholds_count_and_the_same_ones_dont(tmp_path):
    filled(tmp_path/"run")
    hows = dict(score="keywords"), dict(score="keywords"), dict(score="exact_match"), dict(score="keywords", leak_at=.5)
    assert [together(report_run(tmp_path/"run", **how))[0] for how in hows] == [1, 1, 2, 3]
    assert together(report_run(tmp_path/"run", alpha=.05)) == (3, .07)          # the same claim, at a larger α
    assert together(report_run(tmp_path/"run")) == (3, .03)


def test_a_session_remembers_and_says_so():
    def run(seed, n=64): return report_run(filled(None, n, settings=SETTINGS | dict(model="session", seed=seed)))
    assert together(run(0)) == (1, .01) and together(run(0)) == (1, .01)
    assert together(run(1)) == (2, .02)
    longer = run(1, 128)
    assert longer.anytime and together(longer) == (3, .03) and "seed 0" in longer.claims[-1]
    assert longer.how["looks"] == [(64, 3), (128, 3)]
    with pytest.warns(RuntimeWarning, match="1 of the 3 questions"):
        few = report_run(filled(None, qas=QAS[:1], settings=SETTINGS | dict(model="session", seed=0)))
    assert any(
        "Each claim was computed at α / 18" in claim and "questions that grew or were chosen" in claim
        for claim in few.claims
    )


def test_the_page_the_card_and_the_data_say_it_too(tmp_path):
    filled(tmp_path/"run")
    report_run(tmp_path/"run", n=16)
    path = report_run(tmp_path/"run", n=32).save(tmp_path/"r.html")
    assert "were reported on before (16 draws" in path.read_text() and "16 draws" in path.with_suffix(".md").read_text()
    known = json.loads(path.with_suffix(".json").read_text())["known"]
    assert known == [dict(seed=0, score="key words (fraction)", leak_at=1., sampling="fixed-n", n=16, alpha=.01)]


def test_folders_of_an_earlier_version_and_broken_neighbours(tmp_path):
    filled(tmp_path/"run")
    for n in (16, 32): report_run(tmp_path/"run", n=n)
    there = json.loads((tmp_path/"run"/"run.json").read_text())
    del there["checksum"]
    for entry in there["looks"]: del entry["parts"], entry["anytime"]
    (tmp_path/"run"/"run.json").write_text(json.dumps(there))
    (tmp_path/"broken").mkdir()
    (tmp_path/"broken"/"run.json").write_text("{")
    assert together(report_run(tmp_path/"run", n=64)) == (2, .02)


# --- run.json is lost ---

def test_draws_without_their_description_hold_at_all_times(tmp_path):
    filled(tmp_path/"run", 64)
    report_run(tmp_path/"run", n=16)
    (tmp_path/"run"/"run.json").unlink()
    with pytest.warns(RuntimeWarning, match="draws without the run.json .* an earlier report is assumed"):
        open_run(tmp_path/"run", SETTINGS, QAS)
    for n in (64, 32):
        r = report_run(tmp_path/"run", n=n)
        assert r.anytime and together(r) == (2, .02) and "can't be excluded, since run.json was lost" in r.claims[-1]
    with pytest.raises(ValueError, match="another plan of looks"): open_run(tmp_path/"run", SETTINGS, QAS, planned=[64])


def test_a_part_of_the_questions_of_a_lost_run_is_refused(tmp_path):
    filled(tmp_path/"run")
    (tmp_path/"run"/"run.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="1 of its 3 files of draws .* draws-q2.parquet. A run may grow, never choose"):
        open_run(tmp_path/"run", SETTINGS, QAS[:2])
    assert [p for p in sorted(tmp_path.rglob("*")) if p.name != ".lock"] == [p for p in before if p.name != ".lock"]


def test_an_empty_folder_is_new(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled(tmp_path/"run")
    assert read_run(tmp_path/"run").looks == [] and not report_run(tmp_path/"run").anytime


# --- and it is true ---

def within(wrong, runs, alpha):
    "Whether so many wrong runs are at most what α allows: a right promise fails here less than once in 10,000."
    return wrong <= binom.ppf(1 - 1e-4, runs, alpha)


@pytest.mark.parametrize("p", [.02, .1, .3])
def test_whoever_signs_the_first_report_or_extends_is_wrong_with_at_most_twice_alpha(tmp_path, p):
    """α = 0.05, a first report at 64 draws, later ones at 60 numbers of draws up to 4,096: 20,000 runs. What is printed, 2α,
    holds; α doesn't, which is why it is printed."""
    filled(tmp_path/"run")
    said = [together(report_run(tmp_path/"run", n=n, alpha=.05))[1] for n in (16, 64)]
    rng, first, runs = np.random.default_rng(1), 64, 20_000
    leaks = rng.binomial(first, p, runs)
    wrong = binom.cdf(leaks, first, p) <= .05                   # Clopper and Pearson's bound is below the truth
    times = np.unique(np.geomspace(first, 4096, 60).astype(int))
    for before, n in zip(times, times[1:]):
        leaks = leaks + rng.binomial(n - before, p, runs)
        wrong |= (rate_ends(np.arange(n + 1), n, .05, "upper") < p)[leaks]
    assert said == [.05, .1] and within(wrong.sum(), runs, said[1])


def test_extension_costs_more_than_one_alpha():
    "Where the first bound fails with α = 0.05, at 16 draws: more than α, less than 2α, of 20,000 runs (measured: 0.058)."
    rng, n, p, runs = np.random.default_rng(2), 16, beta.isf(.05, 1, 16) * (1 + 1e-9), 20_000
    leaks = rng.binomial(n, p, runs)
    wrong = binom.cdf(leaks, n, p) <= .05
    for m in np.unique(np.geomspace(16, 3200, 150).astype(int))[1:]:
        leaks, n = leaks + rng.binomial(m - n, p, runs), m
        wrong |= (rate_ends(np.arange(n + 1), n, .05, "upper") < p)[leaks]
    assert not within(wrong.sum(), runs, .05) and within(wrong.sum(), runs, .1)


def test_the_smallest_of_ten_seeds_is_wrong_as_often_as_is_said(tmp_path):
    "10 seeds at α = 0.01, 20,000 times: nearly 10 %, and not more than the 10 % that the tenth report states."
    for seed in range(10): filled(tmp_path/f"run{seed}", settings=SETTINGS | dict(seed=seed))
    said = [together(report_run(tmp_path/f"run{seed}"))[1] for seed in range(10)][-1]
    rng, n, runs = np.random.default_rng(3), 1024, 20_000
    best = rng.binomial(n, .01, (runs, 10)).min(1)
    wrong = (beta.isf(.01, best + 1, n - best) < .01).sum()
    assert wrong > .03 * runs and within(wrong, runs, said)
