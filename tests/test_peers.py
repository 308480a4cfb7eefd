"""Readers on the real logs at hand and on small files of each documented schema, broken as files break."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_tofu import LOGS, RUNS, needs_logs, published

from probunlearn.data import QA
from probunlearn.draws import draws_from_texts
from probunlearn.formats import read_answers
from probunlearn.metrics import dataset_claims
from probunlearn.peers import read_inspect, read_leak_k, read_lm_eval, read_open_unlearning, read_summary
from probunlearn.peers import read_tofu_log, tofu_splits, tofu_summary, write_summary
from probunlearn.report import Asked, Report
from probunlearn.scores import score_draws
from probunlearn.tables import draws_from_table, scores_from_table
from probunlearn.tofu import forget_quality, truth_score
from probunlearn.writers import unlearning_summary, write_inspect_scores, write_lm_eval


def write(folder, name, content):
    (folder/name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder/name


@needs_logs
@pytest.mark.parametrize("run", RUNS)
def test_a_published_log_is_read_whole(run):
    table = read_tofu_log(published(run))
    sizes = {"retain": 300, "real authors": 100, "world facts": 117, "forget": 300}
    assert table.groupby("split").size().to_dict() == sizes
    assert not table.question.str.contains("INST").any() and not table.answer.isna().any()
    forget = table[table.split == "forget"]
    assert forget.question_id.tolist() == [str(i) for i in range(300)]
    said = json.loads(published(run).read_text())["eval_log_forget.json"]["generated_text"]
    assert forget.answer.tolist() == [said[str(i)][1] for i in range(300)]
    draws, qas = draws_from_table(forget)
    stored = scores_from_table(forget, "rouge_l_recall")
    assert (score_draws(draws, qas, "rouge_l_recall") == stored).all()


@needs_logs
def test_questions_of_a_log_are_tofus():
    from probunlearn.data import load_qa
    known = {qa.question: qa.answer for qa in load_qa(LOGS.parent/"tofu"/"forget10.json")}
    forget = read_tofu_log(published("full")).query("split == 'forget'")
    assert [known[q].strip() for q in forget.question] == forget.reference.str.strip().tolist()


@needs_logs
def test_a_log_without_some_rows_moves_none(tmp_path):
    log = json.loads(published("full").read_text())["eval_log_forget.json"]
    for part in log.values(): part.pop("7")
    for name in "generated_text", "rougeL_recall": log[name].pop("12")
    for name in "avg_gt_loss", "avg_paraphrased_loss": log[name].pop("20")
    whole = read_tofu_log(published("full")).query("split == 'forget'")
    table = read_tofu_log(write(tmp_path, "eval_log_forget.json", log))
    assert table.question_id.tolist() == [str(i) for i in range(300) if i != 7]
    for name in "probability", "truth_ratio", "rouge":
        ours, theirs = (tofu_splits(t)["forget"].per_question()[name] for t in (table, whole))
        lost = np.isnan(ours)
        assert table.question_id[lost].tolist() == (["12"] if name == "rouge" else ["20"])
        assert (ours[~lost] == np.delete(theirs, 7)[~lost]).all()
    assert table.answer.isna().sum() == 1 and table.set_index("question_id").answer.isna()["12"]


@needs_logs
def test_published_answers_go_all_the_way_to_a_report():
    table = read_tofu_log(published("retain90")).query("split == 'forget'").head(20)
    greedy, qas = draws_from_table(table)
    report = Report("retain90", Asked(qas, greedy, greedy), score="rouge_l_recall", leak_at=.9)
    assert report.x.shape == (20, 1) and "20 questions" in report.claims[0]


def test_logs_of_one_split_take_their_name_from_the_file(tmp_path):
    log = dict(
        generated_text={"3": ["Question: Who?\n", "Me.", "You."]},
        avg_gt_loss={"10": 1., "3": 2.},
        avg_paraphrased_loss={},
        average_perturb_loss={"3": [1., 2.]},
        rougeL_recall={},
    )
    table = read_tofu_log(write(tmp_path, "eval_real_author_wo_options.json", log))
    assert table.split.unique().tolist() == ["real authors"]
    assert table.question_id.tolist() == ["3", "10"] and table.question[0] == "Who?"
    split = tofu_splits(table)["real authors"]
    assert split.perturbed.shape == (2, 2) and np.isnan(split.perturbed[1]).all() and np.isnan(split.paraphrased).all()


def test_open_unlearnings_rows_keep_their_indices(tmp_path):
    def row(i): return dict(input=f"Q{i}?", ground_truth="A.", generation="B.", rougeL_recall=i / 20, rouge1_recall=1.)
    rouge = {str(i): row(i) for i in range(12)} | {"4": None}
    path = write(tmp_path, "TOFU_EVAL.json", {
        "forget_Q_A_ROUGE": dict(agg_value=.3, value_by_index=rouge),
        "retain_Q_A_Prob": dict(agg_value=.9, value_by_index={"0": dict(prob=.9, avg_loss=.1)}),
        "model_utility": dict(agg_value=.5),
    })
    table = read_open_unlearning(path).query("metric == 'forget_Q_A_ROUGE'")
    assert table.question_id.tolist() == [str(i) for i in range(12)]
    assert table.answer.isna().tolist() == [i == 4 for i in range(12)]
    x = scores_from_table(table, "rougeL_recall")
    assert np.isnan(x[4, 0]) and np.delete(x[:, 0], 4).tolist() == [i / 20 for i in range(12) if i != 4]
    claims = dataset_claims(x, missing="worst", leak_at=.5)
    assert float(claims["average score"]) > np.nanmean(x)
    with pytest.raises(ValueError, match="first is '4'"): draws_from_table(table)
    assert len(draws_from_table(table[table.answer.notna()])[0]) == 11


UNLEARNING = Path(os.environ.get("PROBUNLEARN_TEST_DATA") or "missing", "open_unlearning")
needs_unlearning = pytest.mark.skipif(not UNLEARNING.is_dir(), reason="PROBUNLEARN_TEST_DATA holds no open_unlearning")
TOFU, MUSE = ("tofu_llama3.2-1b_full_forget01", "tofu_llama3.2-1b_retain99"), "muse_llama2-7b_news_target"
MEANS = {       # metric → field, of the numbers that are plain means over the rows
    "exact_memorization": "score", "extraction_strength": "score", "forget_Q_A_Prob": "prob",
    "forget_Q_A_ROUGE": "rougeL_recall", "forget_knowmem_ROUGE": "rougeL_f1", "forget_verbmem_ROUGE": "rougeL_f1",
    "retain_knowmem_ROUGE": "rougeL_f1",
}
NOT_IN_THE_FILE = {"forget_quality", "model_utility", "privleak"}      # they need several metrics, or another model


def unlearning(name): return read_open_unlearning(UNLEARNING/f"{name}_EVAL.json")


def summary(name): return read_summary(UNLEARNING/f"{name}_SUMMARY.json")


def field(table, metric, name="score"): return table[table.metric == metric][name].to_numpy(float)


def attack_auc(table, metric):
    "How often a question to forget has a smaller score than one of the holdout, ties halved."
    forget, holdout = field(table, f"{metric}.forget"), field(table, f"{metric}.holdout")
    return np.mean(np.sign(holdout[None] - forget[:, None]) + 1) / 2


@needs_unlearning
@pytest.mark.parametrize("name", [*TOFU, MUSE])
def test_rows_of_open_unlearning_give_their_summary(name):
    table, numbers = unlearning(name), summary(name)
    for metric in numbers.keys() - NOT_IN_THE_FILE:
        ours = attack_auc(table, metric) if metric.startswith("mia") else field(table, metric, MEANS[metric]).mean()
        assert ours == pytest.approx(numbers[metric], abs=1e-9), metric
    stored = json.loads((UNLEARNING/f"{name}_EVAL.json").read_text())
    rouge = [metric for metric in stored if metric.endswith("ROUGE")]
    for metric in rouge:
        rows = table[table.metric == metric]
        values = stored[metric]["value_by_index"]
        assert rows.question_id.tolist() == list(values) == [str(i) for i in range(len(values))]
        assert rows.answer.tolist() == [row["generation"] for row in values.values()]
        draws, qas = draws_from_table(rows)
        for ours, theirs in ("rouge_l_recall", "rougeL_recall"), ("rouge_l_f1", "rougeL_f1"):
            assert score_draws(draws, qas, ours)[:, 0] == pytest.approx(rows[theirs].tolist(), abs=1e-9)


@needs_unlearning
@pytest.mark.parametrize("name", TOFU)
def test_truth_ratio_and_utility_of_open_unlearning(name):
    table, numbers = unlearning(name), summary(name)
    stored = json.loads((UNLEARNING/f"{name}_EVAL.json").read_text())
    terms = []
    for split in "retain", "ra", "wf":
        probability = f"{split}_Q_A_Prob" + ("_normalised" if split != "retain" else "")
        ratio = truth_score(field(table, f"{split}_Truth_Ratio")).mean()
        assert ratio == pytest.approx(stored[f"{split}_Truth_Ratio"]["agg_value"], abs=1e-9)
        rouge = field(table, f"{split}_Q_A_ROUGE", "rougeL_recall").mean()
        terms += [field(table, probability, "prob").mean(), rouge, ratio]
    assert stats.hmean(terms) == pytest.approx(numbers["model_utility"], abs=1e-9)
    ratio = truth_score(field(table, "forget_truth_ratio"), forget=True).mean()
    assert ratio == pytest.approx(stored["forget_truth_ratio"]["agg_value"], abs=1e-9)


@needs_unlearning
@pytest.mark.parametrize("name", TOFU)
def test_losses_of_open_unlearning_give_its_numbers_under_its_names(name):
    "Their losses are in single precision, and a share of probabilities has 1e-10 added below."
    splits = tofu_splits(unlearning(name))
    assert {split: len(part.loss) for split, part in splits.items()} == {
        "forget": 40, "retain": 400, "real authors": 100, "world facts": 117}
    stored = json.loads((UNLEARNING/f"{name}_EVAL.json").read_text())
    for metric, ours in tofu_summary(splits).items():
        assert ours == pytest.approx(stored[metric]["agg_value"], abs=2e-6), metric


@needs_unlearning
def test_forget_quality_of_open_unlearning_needs_the_model_that_never_saw_it():
    full, retain = (field(unlearning(name), "forget_truth_ratio") for name in TOFU)
    quality = float(forget_quality(full, retain))
    assert quality == pytest.approx(summary(TOFU[0])["forget_quality"], abs=1e-9)
    assert quality == pytest.approx(stats.ks_2samp(full, retain).pvalue, abs=1e-12)
    assert "forget_quality" not in summary(TOFU[1])


@needs_unlearning
def test_privleak_of_open_unlearning():
    "Against the model that never saw the forget set, or a coin; MUSE's is against a model that is in no file here."
    full, retain = (1 - attack_auc(unlearning(name), "mia_min_k") for name in TOFU)
    for name, share, reference in (TOFU[0], full, retain), (TOFU[1], retain, .5):
        ours = (share - reference) / (reference + 1e-10) * 100
        assert ours == pytest.approx(summary(name)["privleak"], abs=1e-9)


def test_leak_k_with_holes_becomes_draws_with_holes(tmp_path):
    said = [[f"a{i}" if (q, i) not in {(0, 0), (1, 3)} else None for i in range(4)] for q in range(3)]
    def line(q, row):
        responses = [dict(response=s, CS=.5) for s in row]
        return json.dumps(dict(prompt=f"Q{q}", ground_truth="a1", responses=responses))
    lines = [line(q, row) for q, row in enumerate(said)]
    table = read_leak_k(write(tmp_path, "generations_n4.json", "\n".join(lines) + "\n"))
    draws, qas = draws_from_table(table, seed=7)
    assert [d.texts for d in draws] == said and draws[0].seed == 7 and [qa.id for qa in qas] == ["0", "1", "2"]
    x = score_draws(draws, qas, "exact_match")
    assert np.argwhere(np.isnan(x)).tolist() == [[0, 0], [1, 3]] and np.nansum(x) == 3 and (x[:, 1] == 1).all()
    shuffled = table.sample(frac=1, random_state=0)     # the draw column decides, not the order
    draws, mixed = draws_from_table(shuffled)
    again = dict(zip([qa.id for qa in mixed], score_draws(draws, mixed, "exact_match")))
    for i, qa in enumerate(qas): np.testing.assert_array_equal(again[qa.id], x[i])


def test_the_harness_with_repeats(tmp_path):
    def line(i, said):
        arguments = {"gen_args_0": dict(arg_0=f"Q{i}", arg_1={})}
        return json.dumps(dict(doc_id=i, doc=dict(q="?"), target=17, arguments=arguments, resps=[said],
                               filtered_resps=[said[0]], filter="none", exact_match=1.))
    one = read_lm_eval(write(tmp_path, "one.jsonl", "\n".join(line(i, ["x"]) for i in (0, 1))))
    assert one.question_id.tolist() == ["0", "1"] and one.exact_match.tolist() == [1, 1] and one.reference[0] == "17"
    many = read_lm_eval(write(tmp_path, "many.jsonl", "\n".join(line(i, ["x", "y", "x"]) for i in (0, 1))))
    assert "exact_match" not in many and many.draw.tolist() == [0, 1, 2] * 2
    assert [d.counts.tolist() for d in draws_from_table(many)[0]] == [[2, 1]] * 2


def test_inspects_epochs_are_draws(tmp_path):
    def sample(i, e, text):
        found = dict(id=i, epoch=e, input="Why?", target="So.", output=None, scores=None)
        if text is None: return found
        message = dict(role="assistant", content=[dict(type="text", text=text)])
        mark = dict(value="C" if text == "So." else "I")
        return found | dict(output=dict(choices=[dict(message=message)]), scores=dict(judge=mark))
    samples = [sample(10, 1, "No."), sample(2, 2, "So."), sample(2, 1, None), sample(10, 2, "So.")]
    table = read_inspect(write(tmp_path, "log.json", dict(samples=samples)))
    assert list(zip(table.question_id, table.draw)) == [("2", 0), ("2", 1), ("10", 0), ("10", 1)]
    np.testing.assert_array_equal(scores_from_table(table, "judge"), [[np.nan, 1], [0, 1]])
    assert draws_from_table(table)[0][0].texts == [None, "So."]


def test_summaries_come_back(tmp_path):
    path = write_summary(dict(b=np.float32(.5), a=1, none=None, nan=np.nan), tmp_path/"new", name="MUSE")
    assert path.name == "MUSE_SUMMARY.json" and list(read_summary(path)) == ["a", "b"] and read_summary(path)["b"] == .5
    with pytest.raises(ValueError, match="map metrics to numbers"): read_summary(write(tmp_path, "x.json", [1]))


@needs_unlearning
@pytest.mark.parametrize("name", [*TOFU, MUSE])
def test_open_unlearnings_summary_is_made_again_from_its_rows(name, tmp_path):
    "Every number of theirs to 1e-9; MUSE's privleak is against a model that is in no file here."
    reference = unlearning(TOFU[1]) if name == TOFU[0] else None
    numbers = unlearning_summary(unlearning(name), reference)
    ours, theirs = read_summary(write_summary(numbers, tmp_path)), summary(name)
    assert {k: ours[k] for k in theirs if (name, k) != (MUSE, "privleak")} == pytest.approx(
        {k: v for k, v in theirs.items() if (name, k) != (MUSE, "privleak")}, abs=1e-9)
    stored = json.loads((UNLEARNING/f"{name}_EVAL.json").read_text())
    averages = {k: stored[k]["agg_value"] for k in ours if "Q_A" in k or "ratio" in k.lower()}
    assert {k: ours[k] for k in averages} == pytest.approx(averages, abs=1e-9)


def test_draws_with_holes_come_back_from_other_tools_files(tmp_path):
    "What the readers make of the written files is what was written: ids, answers, holes and scores."
    said = [["So.", None, "No.", "So."], [None] * 4, ["Löwe – \"x\"\n", "", "So.", "[1]"]]
    others = {"001": (), "a/b": ("No.",), "7": ("x",)}
    qas = [QA(id, f"Why {id}?", "So.", alternatives=more) for id, more in others.items()]
    draws = [draws_from_texts(qa.id, texts) for qa, texts in zip(qas, said)]
    x = score_draws(draws, qas, "exact_match")
    written = write_lm_eval(tmp_path/"samples_ours.jsonl", draws, qas, dict(exact_match=x))
    back, records = draws_from_table(read_answers(written))
    assert [(d.id, d.texts) for d in back] == [(d.id, d.texts) for d in draws]
    assert [(q.id, q.question, q.answer, q.alternatives) for q in records] == [
        (q.id, q.question, q.answer, q.alternatives) for q in qas]
    np.testing.assert_array_equal(score_draws(back, records, "exact_match"), x)
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [line["exact_match"] for line in lines] == [pytest.approx(2 / 3), None, .25]
    one = [draws_from_texts(d.id, d.texts[:1]) for d in draws]
    written = write_lm_eval(written, one, qas, dict(exact_match=x[:, :1]))
    assert read_lm_eval(written).exact_match.tolist() == [1, pytest.approx(np.nan, nan_ok=True), 0]
    scored = [json.loads(line) for line in write_inspect_scores(tmp_path/"s.jsonl", draws, x).read_text().splitlines()]
    assert {(r["id"], r["epoch"] - 1): r["value"] for r in scored} == {
        (q.id, i): x[j, i] for j, q in enumerate(qas) for i in range(4) if x[j, i] == x[j, i]}
