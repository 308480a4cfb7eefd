"""TOFU's metrics against the logs published with it, recomputed by hand, and against losses with known answers."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from probunlearn.peers import read_summary, read_tofu_log, tofu_splits, tofu_summary, write_summary
from probunlearn.tofu import TofuSplit, answer_probability, forget_quality, mean_loss, model_utility
from probunlearn.tofu import truth_ratio, truth_score

DATA = os.environ.get("PROBUNLEARN_TEST_DATA")
LOGS = Path(DATA or "missing", "tofu_eval_logs")
needs_logs = pytest.mark.skipif(not LOGS.is_dir(), reason="PROBUNLEARN_TEST_DATA holds no tofu_eval_logs")
FILES = {
    "retain": "eval_log.json",
    "real authors": "eval_real_author_wo_options.json",
    "world facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
RUNS = "full", "retain90"
# probability, ROUGE-L recall, truth ratio score by each of two definitions, of the model trained on everything
GOLDEN = {
    "retain": (.989527, .985655, .474699, .453867),
    "real authors": (.455482, .933000, .596229, .505160),
    "world facts": (.418562, .882479, .539033, .423055),
    "forget": (.990939, .985450, .515985, .530370),
}
UTILITIES = [
    ("full", "geometric", .622677),
    ("full", "arithmetic", .585886),
    ("retain90", "geometric", .613745),
    ("retain90", "arithmetic", .575240),
]


def published(run): return LOGS/f"llama2-7b_{run}_wd0.01.json"


def log_of(run, split): return json.loads(published(run).read_text())[FILES[split]]


def rows_by_hand(log, options):
    "Probability, ROUGE, geometric and arithmetic ratio of each question, by plain formulas."
    for i in log["avg_gt_loss"]:
        true = np.exp(-log["avg_gt_loss"][i])
        wrong = [np.exp(-v) for v in log["average_perturb_loss"][i]]
        para = np.exp(-log["avg_paraphrased_loss"][i])
        if options: true = true / (true + sum(wrong))
        yield true, log["rougeL_recall"][i], stats.gmean(wrong) / para, np.mean(wrong) / para


def by_hand(run):
    "Split -> (probability, ROUGE, score geometric, score arithmetic, ratios), with loops over the log."
    found = {}
    for split in FILES:
        rows = list(rows_by_hand(log_of(run, split), split in ("real authors", "world facts")))
        p, rouge, geometric, arithmetic = np.array(rows).T
        def score(ratios):
            if split == "forget": return np.mean([min(v, 1 / v) for v in ratios])
            return np.mean([max(0, 1 - v) for v in ratios])
        found[split] = p.mean(), rouge.mean(), score(geometric), score(arithmetic), geometric
    return found


@needs_logs
@pytest.mark.parametrize("run", RUNS)
def test_every_number_of_the_published_logs_is_recomputed(run):
    splits = tofu_splits(read_tofu_log(published(run)))
    hand = by_hand(run)
    for split, part in splits.items():
        both = [part.averages(d, forget=split == "forget") for d in ("geometric", "arithmetic")]
        ours = both[0]["probability"], both[0]["rouge"], both[0]["truth_ratio"], both[1]["truth_ratio"]
        assert ours == pytest.approx(hand[split][:4], abs=1e-12)
        if run == "full": assert ours == pytest.approx(GOLDEN[split], abs=1e-6)
        stored = log_of(run, split)["truth_ratio"].values()      # float32, by the authors' own code
        assert part.per_question()["truth_ratio"] == pytest.approx(list(stored), rel=1e-5)
        assert part.per_question("share")["truth_ratio"] == pytest.approx(1 / (1 + hand[split][4]), abs=1e-12)


@needs_logs
def test_model_utility_and_forget_quality_of_the_published_logs():
    splits = {run: tofu_splits(read_tofu_log(published(run))) for run in RUNS}
    kept = {run: {k: v for k, v in parts.items() if k != "forget"} for run, parts in splits.items()}
    for run, definition, golden in UTILITIES:
        hand = by_hand(run)
        terms = [hand[s][i] for s in kept[run] for i in (0, 1, 2 if definition == "geometric" else 3)]
        ours = float(model_utility(kept[run], definition=definition))
        assert ours == pytest.approx(stats.hmean(terms), abs=1e-12)
        assert ours == pytest.approx(golden, abs=1e-6)
    found = forget_quality(*(splits[run]["forget"].per_question()["truth_ratio"] for run in RUNS))
    first, second = (np.sort(by_hand(run)["forget"][4]) for run in RUNS)
    knots = np.concatenate([first, second])
    below = [np.searchsorted(side, knots, "right") / 300 for side in (first, second)]
    assert found.distance == pytest.approx(np.abs(below[0] - below[1]).max(), abs=1e-12)
    assert found.distance == pytest.approx(.396667, abs=1e-6)
    assert found.p == pytest.approx(1.834066e-21, rel=1e-5)
    assert found.n == (300, 300) and "log10 p = -20.74" in repr(found)


@needs_logs
def test_a_log_makes_a_summary_under_open_unlearnings_names(tmp_path):
    full, retain = (tofu_splits(read_tofu_log(published(run))) for run in RUNS)
    numbers = tofu_summary(full, reference=retain["forget"])
    assert read_summary(write_summary(numbers, tmp_path)) == numbers
    assert len(numbers) == 14
    assert numbers["forget_quality"] == pytest.approx(1.834066e-21, rel=1e-5)
    assert numbers["ra_Q_A_Prob_normalised"] == pytest.approx(.455482, abs=1e-6)
    with pytest.warns(UserWarning, match="same truth ratios"):
        assert tofu_summary(full, reference=full["forget"])["forget_quality"] == 1


def test_truth_ratios_of_extreme_losses_stay_in_range():
    huge, wrong = np.array([2000., 2000.]), np.array([[2001.] * 5, [1990.] * 5])
    for definition in "geometric", "arithmetic":
        assert truth_ratio(huge, wrong, definition=definition) == pytest.approx(np.exp([-1, 10]))
    assert answer_probability(huge, wrong) == pytest.approx([1 / (1 + 5 * np.exp(-1)), 1 / (1 + 5 * np.exp(10))])
    assert truth_ratio([5000.], [[1.]]) == np.inf
    assert truth_score(np.array([0., np.inf]), forget=True).tolist() == [0, 0] and truth_score([np.inf]) == 0


def test_rows_that_are_missing_stay_missing_in_place():
    rng = np.random.default_rng(0)
    whole = TofuSplit(rng.random(6), rng.random(6), rng.random((6, 3)), rng.random(6), options=True)
    hole = np.array([0, 0, 1, 0, 0, 0], bool)
    broken = TofuSplit(
        loss=np.where(hole, np.nan, whole.loss),
        paraphrased=np.where(hole, np.nan, whole.paraphrased),
        perturbed=np.where(hole[:, None], np.nan, whole.perturbed),
        rouge=whole.rouge,
        options=True,
    )
    for definition in "geometric", "arithmetic", "share":
        for name, row in broken.per_question(definition).items():
            assert (np.isnan(row) == (hole & (name != "rouge"))).all()
            assert row[~hole] == pytest.approx(whole.per_question(definition)[name][~hole])
    assert broken.averages()["probability"] == pytest.approx(whole.per_question()["probability"][~hole].mean())
    one = whole.perturbed.copy()
    one[2, 1] = np.nan                  # one wrong answer fewer
    four = np.delete(whole.perturbed[2:3], 1, 1)
    assert truth_ratio(whole.paraphrased, one)[2] == pytest.approx(truth_ratio(whole.paraphrased[2:3], four)[0])


def test_forget_quality_is_the_exact_two_sample_test():
    assert float(forget_quality([1, 2, 3], [4, 5, 6])) == pytest.approx(2 / 20)  # two of the 20 orders are as far apart
    assert float(forget_quality([1, np.nan, 2, 3], [4, 5, np.nan, 6])) == pytest.approx(.1)
    found = [float(forget_quality(*np.random.default_rng(seed).random((2, 200)))) for seed in range(200)]
    assert stats.kstest(found, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("call, message", [
    (lambda: mean_loss([1.], [1, 0]), "one shape"),
    (lambda: answer_probability([np.inf]), "got inf"),
    (lambda: truth_ratio([1.], [1.]), "question and wrong answer"),
    (lambda: truth_ratio([1.], [[-2.]]), "perturbed must be losses"),
    (lambda: truth_ratio([1.], [[2.]], definition="harmonic"), "got 'harmonic'"),
    (lambda: TofuSplit([], [], [], []), "at least one"),
    (lambda: model_utility({}), "got none"),
    (lambda: forget_quality([], [1.]), "got 0 and 1"),
])
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message): call()


@pytest.mark.skipif(not DATA, reason="PROBUNLEARN_TEST_DATA names no folder with the public data sets")
def test_real_files_through_a_model():
    "TOFU's own files make nine numbers, one call per split; the losses are transformers' own."
    import torch
    from probunlearn.data import encode, load_qa
    from probunlearn.models import small_model
    from probunlearn.recall import tofu_split
    model = small_model("full", device="cpu")
    names = "retain", "real_authors", "world_facts"
    questions = {name: load_qa(Path(DATA, "tofu", f"{name}_perturbed.json"))[:4] for name in names}
    splits = {name: tofu_split(model, qas, max_new_tokens=8) for name, qas in questions.items()}
    assert [s.options for s in splits.values()] == [False, True, True]
    assert [s.perturbed.shape for s in splits.values()] == [(4, 5), (4, 3), (4, 3)]
    assert len([v for row in model_utility(splits).terms.values() for v in row.values()]) == 9
    def theirs(qa, answer=None):
        row = encode(model.tok, qa, answer=answer)
        with torch.no_grad(): return float(model.lm(**{k: torch.tensor([v]) for k, v in row.items()}).loss)
    for name, qas in questions.items():
        for i, qa in enumerate(qas):
            assert splits[name].loss[i] == pytest.approx(theirs(qa), rel=1e-4)
            assert splits[name].paraphrased[i] == pytest.approx(theirs(qa, qa.paraphrased_answer or None), rel=1e-4)
            assert splits[name].perturbed[i] == pytest.approx([theirs(qa, a) for a in qa.perturbed_answers], rel=1e-4)
