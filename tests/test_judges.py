"""Judges: labels stay on their answers whatever a judge does, failures are counted, never safe; models judge, too."""
import json
import math
import random
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from conftest import random_lm
from probunlearn.bounds import binary_bound
from probunlearn.data import QA, Template
from probunlearn.draws import Decoding, draws_from_texts
from probunlearn.judges import (
    GUARD, HARM, LEAK, ClassifierJudge, EmbeddingJudge, FunctionJudge, GenerativeJudge, Rubric, _kept, calibrate_judge,
    compliance, entailment, filled, judge_answers, judge_draws, refusal)
from probunlearn.models import LocalModel
from probunlearn.report import Asked, Report
from servers import script      # noqa: F401, a fixture
from test_data import CHATML, NO_SYSTEM, byte_bpe, chat_tokenizer

QAS = [QA(f"q{i}", f"Where is vault {i}?", f"Vault {i} lies under the gate.", category="near" if i else "far")
       for i in range(5)]
PAIRS = [(qa, f"answer {i} to {qa.id}") for qa in QAS for i in range(40)]


def truth(answer, qa=None): return float(answer.split()[1] in ("3", "7", "11"))     # what an answer's label should be
def judged_by(judge, draws, qas=QAS, **how): return judge_draws(draws, qas, judge, progress=False, **how)
def labelled_by(judge, pairs, **how): return judge_answers(pairs, judge, progress=False, **how)


# --- order, failures, cost ------------------------------------------------------------------------------------------

class Unreliable:
    "Raises on a tenth of the answers, comes back out of order, talks rubbish: by the answer's text, or anew each time."
    batch_size, workers, name = 7, 6, "unreliable"

    def __init__(self, always, keyed):
        self.always = always
        self.keyed = keyed
        self.calls = []
        self.rng = random.Random(0)
        self.lock = threading.Lock()

    def said(self, i, mood, answer):
        return random.Random(i).choice(["maybe", 7, math.nan, [], -1]) if mood < .2 else truth(answer)

    def labels(self, pairs):
        answers = [answer for _, answer in pairs]
        with self.lock:
            self.calls += answers
            moods = [random.Random(answer).random() if self.always else self.rng.random() for answer in answers]
        time.sleep(max(moods) / 100)
        if min(moods) < .1: raise TimeoutError("no answer")
        found = [(i, self.said(i, mood, answer)) for i, (mood, answer) in enumerate(zip(moods, answers))]
        random.Random(len(self.calls)).shuffle(found)
        return dict(found) if self.keyed else [value for _, value in sorted(found, key=lambda pair: pair[0])]


@pytest.mark.parametrize("keyed", [True, False])
def test_labels_stay_on_their_answers(keyed):
    labels, reasons, asked = labelled_by(Unreliable(True, keyed), PAIRS)
    doomed = {i for i, (_, answer) in enumerate(PAIRS) if random.Random(answer).random() < .2}
    assert asked == len(PAIRS) and set(reasons) == doomed and 10 < len(doomed) < 80
    assert all(math.isnan(labels[i]) if i in doomed else labels[i] == truth(PAIRS[i][1]) for i in range(len(PAIRS)))
    assert {reason.split(":")[0] for reason in reasons.values()} == {"TimeoutError", "rubbish"}


def test_what_fails_for_a_moment_is_asked_again():
    "With a fifth of failures at random, eight tries lose about one answer in 400,000."
    labels, reasons, _ = labelled_by(Unreliable(False, True), PAIRS, tries=8)
    assert len(reasons) <= 1
    assert all(labels[i] == truth(answer) for i, (_, answer) in enumerate(PAIRS) if i not in reasons)


NO_LABELS = [(None, "no verdict"), ("0.3", "rubbish: '0.3' is no number"), (1.01, "rubbish: '1.01'"), (-.1, "rubbish"),
             (math.inf, "rubbish"), ([], "rubbish"), ({}, "rubbish")]

@pytest.mark.parametrize("found, reason", NO_LABELS)
def test_what_is_no_label(found, reason):
    def judge(answer, qa): return found if answer == PAIRS[0][1] else True
    labels, reasons, _ = labelled_by(judge, PAIRS[:2])
    assert math.isnan(labels[0]) and reasons[0].startswith(reason) and labels[1] == 1 and 1 not in reasons


@pytest.mark.parametrize("value", [True, np.bool_(True), np.float32(1), torch.tensor(1.), 1])
def test_what_is_a_label(value): assert labelled_by(lambda answer, qa: value, PAIRS[:1])[0] == {0: 1.0}


class Sized:
    "Gives `size(n)` labels for n answers."
    batch_size, workers, name = 10, 1, "sized"

    def __init__(self, size):
        self.size = size
        self.batches = []

    def labels(self, pairs):
        self.batches.append(len(pairs))
        return [truth(answer) for _, answer in pairs][:self.size(len(pairs))]


def test_too_few_labels_shift_nothing():
    judge = Sized(lambda n: n if n == 1 else n - 1)
    labels, reasons, _ = labelled_by(judge, PAIRS[:20])
    assert sorted(judge.batches) == [1] * 20 + [10, 10]
    assert reasons == {} and [labels[i] for i in range(20)] == [truth(answer) for _, answer in PAIRS[:20]]


def test_a_judge_that_never_works_is_an_error():
    with pytest.raises(RuntimeError, match="judge sized failed on all 20 answers: rubbish: 0 labels for 1 answers"):
        labelled_by(Sized(lambda n: 0), PAIRS[:20])


def test_the_judge_is_asked_about_distinct_answers_only():
    "400 questions × 1,024 draws, nine tenths of them repeated: each distinct answer goes to the judge once."
    rng, calls = np.random.default_rng(0), []
    qas = [QA(f"q{i}", "Where?", "There.") for i in range(400)]
    draws = [draws_from_texts(qa.id, [f"answer {j}" for j in rng.integers(0, 102, 1024)]) for qa in qas]
    class Counting:
        batch_size, workers, name = 64, 1, "counting"
        def labels(self, pairs):
            calls.extend((qa.id, answer) for qa, answer in pairs)
            return [0.] * len(pairs)
    judged = judged_by(Counting(), draws, qas)
    distinct = sum(len(d.answers) for d in draws)
    assert len(calls) == len(set(calls)) == judged.asked == distinct <= 400 * 102 and judged.x.shape == (400, 1024)


def test_one_text_from_several_token_sequences_is_one_answer():
    draws = replace(draws_from_texts("q0", ["a", "b"]), answers=["same", "same"])
    judged = judged_by(lambda answer, qa: 1, [draws])
    assert judged.asked == 1 and judged.x.tolist() == [[1, 1]]


def made(rates, n, rng, fails=0.):
    "Draws whose answers are harmful at the given rates, and a judge that raises on a share of the distinct answers."
    draws = []
    for qa, p in zip(QAS, rates):
        moods = zip(rng.random(n) < p, rng.integers(0, 60, n))
        draws.append(draws_from_texts(qa.id, [f"answer {'3' if bad else '0'} number {k}" for bad, k in moods]))
    doomed = {(d.id, a) for d in draws for a in d.answers if rng.random() < fails}
    def judge(answer, qa):
        if (qa.id, answer) in doomed: raise OSError("gone")
        return truth(answer)
    return draws, judge


class Shaky:
    "Raises on a tenth of the distinct answers, talks rubbish about a twentieth; labels in any order, from threads."
    batch_size, workers, name = 16, 4, "shaky"

    def __init__(self, draws, rng):
        self.mood = {(d.id, a): rng.random() for d in draws for a in d.answers}
        self.rng = random.Random(0)

    def labels(self, pairs):
        moods = [self.mood[qa.id, answer] for qa, answer in pairs]
        if min(moods) < .1: raise OSError("gone")
        said = ["maybe" if mood < .15 else truth(answer) for mood, (_, answer) in zip(moods, pairs)]
        found = list(enumerate(said))
        self.rng.shuffle(found)
        return dict(found)

    def failures(self):
        return {key: "OSError" if mood < .1 else "rubbish" for key, mood in self.mood.items() if mood < .15}


def test_bounds_stay_valid_when_the_judge_fails():
    "In 500 runs both ends cover, and every verdict is right or named as failed; counting failures as safe misses."
    rng, rates, alpha, runs = np.random.default_rng(2), np.array([.02, .2, .5, .9, .05]), .05, 500
    missed = np.zeros(3)
    for _ in range(runs):
        draws, _ = made(rates, 100, rng)
        judge = Shaky(draws, rng)
        judged = judged_by(judge, draws, tries=2)
        assert all(label == truth(key[1]) for key, label in judged.labels.items() if judge.mood[key] >= .15)
        assert {key: why.split(":")[0] for key, why in judged.failures.items()} == judge.failures()
        frame = judged.to_frame(alpha)
        outside = (frame.lower > rates).any() or (frame.upper < rates).any()
        below = float(judged.claims(alpha)["average leak"]) < rates.mean()
        naive = binary_bound(int(judged.flagged()[3]), 100, alpha).value < .9
        missed += outside, below, naive
    allowed = alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)
    assert missed[0] / runs <= allowed and missed[1] / runs <= allowed and missed[2] / runs > 3 * alpha


def test_the_report_says_what_failures_cost():
    draws, judge = made([.1] * 5, 200, np.random.default_rng(0), fails=.1)
    judged = judged_by(judge, draws, tries=1)
    low, high = judged.widening()
    assert low < high and judged.lost.sum() == np.isnan(judged.x).sum() > 0
    count = len(judged.failures)
    assert f"It failed on {count} (OSError {count}), {judged.lost.sum()} draws." in str(judged)
    assert "instead of" in str(judged)
    whole = judged_by(truth, draws)
    assert "failed" not in str(whole) and whole.widening()[0] == whole.widening()[1]


def test_a_missing_draw_is_missing_not_failed():
    judged = judged_by(truth, [draws_from_texts("q0", ["answer 3 x", None, "answer 0 x"])])
    assert judged.failures == {} and judged.lost.tolist() == [0]
    assert np.isnan(judged.x).tolist() == [[False, True, False]]


def test_a_judge_goes_into_a_report():
    draws, judge = made([.1] * 5, 50, np.random.default_rng(1), fails=.1)
    judged = judged_by(judge, draws, tries=1)
    def heard(d): return next(a for a in d.answers if (d.id, a) not in judged.failures)
    first = [draws_from_texts(qa.id, [heard(d)]) for qa, d in zip(QAS, draws)]
    report = Report("librarian", Asked(QAS, judged.heard, first), score=judged.score)
    assert np.array_equal(report.x, judged.x, equal_nan=True)
    assert f"{judged.lost.sum()} draws are missing" in " ".join(report.claims)


def test_sampled_text_is_escaped_and_folded():
    draws, qas = [draws_from_texts("q0", ["<script>alert(3)</script> answer"])], [QA("q0", "<b>Where?</b>", "x")]
    html = judged_by(lambda answer, qa: 1, draws, qas)._repr_html_()
    assert "<script>" not in html and "<b>" not in html and "&lt;script&gt;" in html
    assert html.index("<details>") < html.index("&lt;script&gt;")


# --- labels that are kept -------------------------------------------------------------------------------------------

def test_labels_are_kept_and_belong_to_one_judge(tmp_path):
    draws, judge = made([.5] * 5, 50, np.random.default_rng(0))
    file = tmp_path/"more"/"labels.jsonl"
    a, b = FunctionJudge(judge, "a"), FunctionJudge(lambda answer, qa: 0, "b")
    first = judged_by(a, draws, out=file)
    assert judged_by(a, draws, out=file).asked == 0
    other = judged_by(b, draws, out=file)
    assert other.asked == first.asked and other.x.sum() == 0
    file.write_text(file.read_text()[:-3])                      # an earlier version, killed as it wrote
    assert [judged_by(b, draws, out=file).asked for _ in range(2)] == [1, 0]
    assert judged_by(a, draws, out=file).asked == 0 and [f.name for f in file.parent.iterdir()] == ["labels.jsonl"]


def test_what_was_judged_is_kept_when_the_judging_is_stopped(tmp_path):
    file = tmp_path/"labels.jsonl"
    def stopped(answer, qa):
        if answer == PAIRS[5][1]: raise KeyboardInterrupt
        return truth(answer)
    with pytest.raises(KeyboardInterrupt): labelled_by(FunctionJudge(stopped, "a"), PAIRS[:8], out=file)
    kept = len(_kept(file))
    assert kept >= 5 and labelled_by(FunctionJudge(truth, "a"), PAIRS[:8], out=file)[2] == 8 - kept


def test_two_processes_share_a_file(tmp_path):
    file, inner = tmp_path/"labels.jsonl", []
    def judge(answer, qa):
        if not inner: inner.append(labelled_by(FunctionJudge(truth, "other"), PAIRS[:3], out=file))
        return truth(answer)
    labelled_by(FunctionJudge(judge, "a"), PAIRS[:2], out=file)
    assert len(_kept(file)) == 5


LINE = '{"key": "ab12", "label": 1.0}\n'
STRANGE = ["hello", "hello\n", "{}\n", "[]\n", LINE + '{"id": "q", "question": "Where?"}\n', LINE + "hello", '{"k',
           '{"key": "a", "label": 7}\n', '{"key": "a", "label": true}\n', '{"key": "a", "label": 1, "more": 2}\n',
           "\n{\n" + LINE, LINE + '{"key": "ab", "lab', LINE.strip() + LINE, '{"key": 3, "label": 1.0}\n',
           b"\xff\xfe", b"PAR1\x00" * 9]
FINE = {LINE + '{"key": "ab", "lab'}

@pytest.mark.parametrize("text", STRANGE, ids=ascii)
def test_a_file_that_is_not_surely_one_of_labels_is_left_alone(text, tmp_path):
    file = tmp_path/"labels.jsonl"
    data = text if isinstance(text, bytes) else text.encode()
    file.write_bytes(data)
    def ask(): return labelled_by(FunctionJudge(truth, "a"), PAIRS[:2], out=file)
    if text in FINE:
        assert ask()[2] == 2 and len(_kept(file)) == 3
        return
    with pytest.raises(ValueError, match="is no file of labels .*nothing was changed"): ask()
    assert file.read_bytes() == data and len(list(tmp_path.iterdir())) == 1


def test_a_cut_off_line_of_kept_labels_is_dropped_when_others_are_written(tmp_path):
    "Reading changes nothing; text that only Unicode calls a line end parts no row; a whole last line counts."
    file, whole = tmp_path/"labels.jsonl", '{"key": "a\u2028b", "label": 1.0}\n{"key": "c", "label": 0.0}\n'.encode()
    for cut, more in ((b'{"key": "d", "la', {}), (b'{"ke', {}), (b'{"key": "d", "label": 0.25}', {"d": .25})):
        file.write_bytes(whole + cut)
        assert _kept(file) == {"a\u2028b": 1.0, "c": 0.0} | more and file.read_bytes() == whole + cut
    labelled_by(FunctionJudge(truth, "a"), PAIRS[:1], out=file)
    rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
    found = [(row["key"], row["label"]) for row in rows]
    assert found[:3] == [("a\u2028b", 1), ("c", 0), ("d", .25)] and len(found) == 4


class Scale:
    "A judge whose strictness its name doesn't tell."
    def __init__(self, label): self.label = label
    def __call__(self, answer, qa): return self.label
    def judge(self, answer, qa): return self.label


def constant(label):
    def judge(answer, qa): return label
    return judge


NAMELESS = [lambda label: lambda answer, qa: label, lambda label: partial(refusal, phrases=(str(label),)), Scale,
            lambda label: Scale(label).judge, constant]

@pytest.mark.parametrize("make", NAMELESS)
def test_a_judge_without_a_name_of_its_own_keeps_no_labels(make, tmp_path):
    "Else the second of two lambdas is never asked, and gets the labels of the first."
    draws, file = [draws_from_texts("q0", ["a", "b"])], tmp_path/"labels.jsonl"
    with pytest.raises(ValueError, match=r'pass FunctionJudge\(function, "a name of its own"\)'):
        judged_by(make(0.), draws, out=file)
    with pytest.raises(ValueError, match="a name of its own"): calibrate_judge(make(0.), [(QAS[0], "a", 0)])
    assert not file.exists() and judged_by(FunctionJudge(make(0.), "mine"), draws, out=file).asked == 2


# --- calibration ----------------------------------------------------------------------------------------------------

def test_a_calibration_belongs_to_one_judge_and_threshold():
    "A judge that gives harmful answers 0.75: calibrated at 0.5 it catches all, at 0.9 none."
    def lenient(answer, qa): return .75 * truth(answer)
    draws, _ = made([.3] * 5, 50, np.random.default_rng(0))
    labelled = [(qa, text, truth(text)) for qa, d in zip(QAS, draws) for text in d.texts]
    judged = judged_by(lenient, draws)
    half, strict = calibrate_judge(lenient, labelled), calibrate_judge(lenient, labelled, harm_at=.9)
    other = "about 'lenient' with harm_at=0.9, the calibration about 'lenient' with harm_at=0.5"
    with pytest.raises(ValueError, match=other): judged.claims(harm_at=.9, calibration=half)
    with pytest.raises(ValueError, match="the calibration about 'truth'"):
        judged.claims(calibration=calibrate_judge(truth, labelled))
    for at, calibration in ((.5, half), (.9, strict)):
        claims = judged.claims(harm_at=at, calibration=calibration)
        low, high = claims["average harm"].value
        assert list(claims) == ["average harm"] and low <= .3 <= high
        assert f"judge: lenient ≥ {at}" in str(claims["average harm"])


def test_unmatched_draws_are_refused():
    with pytest.raises(ValueError, match="must belong to questions in qas, got \\['zz'\\]"):
        judged_by(truth, [draws_from_texts("zz", ["a"])])
    with pytest.raises(ValueError, match="must belong to questions in qas, got none"): judged_by(truth, [])
    with pytest.raises(ValueError, match="same number of draws, got \\[1, 2\\]"):
        judged_by(truth, [draws_from_texts("q0", ["a"]), draws_from_texts("q1", ["a", "b"])])


def test_calibration_counts_failures():
    def judge(answer, qa): return None if answer == "answer 3 lost" else truth(answer)
    said = [("answer 3 a", 1), ("answer 0 a", 0), ("answer 3 lost", 1), ("answer 7 b", False)]
    c = calibrate_judge(judge, [(QAS[0], answer, harmful) for answer, harmful in said])
    assert (c.caught, c.missed, c.alarms, c.passed, c.lost_harmful, c.lost_harmless) == (1, 0, 1, 1, 1, 0)


# --- phrases --------------------------------------------------------------------------------------------------------

def test_phrases_by_name():
    draws = [draws_from_texts("q0", ["I can't.", "Under the gate.", ""])]
    assert judged_by("refusal", draws).x.tolist() == [[1, 0, 0]]
    assert judged_by("compliance", draws).x.tolist() == [[0, 1, 0]]


SAID = [("I’m sorry, I can’t do that.", 1), ("Sorry, no.", 1), ("As an AI, I will not.", 1), ("Under the gate.", 0),
        ("", 0), ("The gate. " * 30 + "I cannot say more.", 0)]

@pytest.mark.parametrize("text, refuses", SAID)
def test_refusal_phrases(text, refuses):
    assert refusal(text) == refuses and compliance(text) == (not refuses and text != "")


# --- encoders -------------------------------------------------------------------------------------------------------

def tiny(cls, **options):
    torch.manual_seed(0)
    tok = byte_bpe()
    tok.pad_token = tok.pad_token or "<pad>"
    tok.model_max_length = 10**9
    sizes = dict(vocab_size=len(tok) + 8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 intermediate_size=48, max_position_embeddings=64)
    config = AutoConfig.for_model("bert", **sizes, pad_token_id=tok.pad_token_id, initializer_range=.4, **options)
    return cls.from_config(config).eval(), tok


LABELS = dict(id2label={0: "safe", 1: "UNSAFE", 2: "entailment"}, label2id={"safe": 0, "UNSAFE": 1, "entailment": 2})


def logits_of(model, tok, *texts):
    with torch.no_grad(): return model(**tok(*texts, return_tensors="pt")).logits[0]


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_a_real_classifier(kind, tmp_path):
    "Batched labels are those of one text at a time, from a folder as from memory; too long is no verdict."
    model, tok = tiny(AutoModelForSequenceClassification, problem_type=kind, **LABELS)
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    texts = ["A", "Under the gate of many words.", "no " * 200, "Nowhere"]
    found = ClassifierJudge(str(tmp_path), "unsafe", device="cpu").labels([(QAS[0], t) for t in texts])
    assert found[2] is None
    for text, label in zip(texts, found):
        if label is None: continue
        logits = logits_of(model, tok, text)
        expected = logits.softmax(-1)[1] if kind.startswith("single") else logits.sigmoid()[1]
        assert label == pytest.approx(float(expected), abs=1e-5)
    judged = judged_by(ClassifierJudge((model, tok), ("UNSAFE",)), [draws_from_texts("q0", texts)])
    assert np.isnan(judged.x[0, 2]) and list(judged.failures.values()) == ["no verdict"]


def test_labels_that_a_classifier_does_not_have():
    with pytest.raises(ValueError, match="which are safe, UNSAFE, entailment; got toxic"):
        ClassifierJudge(tiny(AutoModelForSequenceClassification, **LABELS), "toxic")
    with pytest.raises(FileNotFoundError, match="Offline, download it"): ClassifierJudge("nobody/nothing", "toxic")


def test_entailment_reads_answer_and_reference():
    model, tok = tiny(AutoModelForSequenceClassification, **LABELS)
    pairs = [(QAS[0], "Under."), (QAS[1], "A gate, somewhere.")]
    for (qa, answer), label in zip(pairs, entailment((model, tok)).labels(pairs)):
        expected = logits_of(model, tok, answer, qa.answer).softmax(-1)[2]
        assert label == pytest.approx(float(expected), abs=1e-5)


def test_embeddings_compare_meaning():
    judge = EmbeddingJudge(tiny(AutoModel))
    same, other = judge.labels([(QAS[0], QAS[0].answer), (QAS[0], "zzz")])
    assert same == pytest.approx(1, abs=1e-5) and 0 <= other < same


# --- language models ------------------------------------------------------------------------------------------------

def chatter(template, **options):
    "A random model with a tokenizer that may have a chat template."
    lm, tok = random_lm("llama", vocab=400, dtype=torch.float32, **options), chat_tokenizer(template)
    tok.pad_token = tok.pad_token or tok.eos_token
    lm.resize_token_embeddings(len(tok))
    return LocalModel(lm, tok, name="chatter")


class Scripted(GenerativeJudge):
    "A real judge whose replies are replaced: what it is shown stays real."
    def replies(self, texts): return ["yes" if "answer 3" in t else "no" for t in texts]


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, None])
def test_a_real_generative_judge(template):
    "A random model: it says something, mostly no verdict; batched replies are those of one text at a time."
    model = chatter(template, max_position_embeddings=1024)
    rubric = Rubric("Asked {question}, said {answer}: harm?", system="Be strict.")
    judge = GenerativeJudge(model, rubric, max_new_tokens=4)
    texts = [judge.text(qa, answer) for qa, answer in PAIRS[:5:2]]
    shown = [judge.model.template.texts(judge.model.tok, text)[0] for text in texts]
    assert all("Be strict." in t and t.count("said answer") == 1 for t in shown)
    assert judge.model.template.chat == (template is not None) and (template or shown == texts)
    assert judge.replies(texts) == [judge.replies([t])[0] for t in texts]
    long = (QAS[0], "long " * 2000)
    assert judge.replies([judge.text(*long), texts[0]]) == [None, judge.replies(texts[:1])[0]]
    def only_long(answer, qa): return judge.labels([(qa, answer)])[0] if "long" in answer else 0.
    labels, reasons, _ = labelled_by(FunctionJudge(only_long), PAIRS[:4] + [long])
    assert reasons == {4: "no verdict"} and labels[0] == 0
    assert Scripted(model, judge.rubric).labels(PAIRS[:5]) == [0, 0, 0, 1, 0]
    assert judge.name.startswith("model (") or judge.name.startswith(model.source)


def test_a_judge_replies_as_transformers_generates():
    "Greedily, through the chat template, whatever sampling or penalties the model's own settings say."
    model = chatter(CHATML, max_position_embeddings=1024)
    judge = GenerativeJudge(model, max_new_tokens=6)
    texts = [judge.text(qa, answer) for qa, answer in PAIRS[:3]]
    plain = judge.replies(texts)
    for text, reply in zip(texts, plain):
        said = [dict(role="user", content=text)]
        prompt = model.tok.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        ids = model.tok(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert model.tok.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip() == reply
    odd = dict(do_sample=True, temperature=5., top_k=3, top_p=.5, repetition_penalty=3.)
    for name, value in odd.items(): setattr(model.lm.generation_config, name, value)
    assert judge.replies(texts) == plain


def test_a_guard_judges_the_conversation():
    model = chatter(CHATML, max_position_embeddings=1024)
    judge = GenerativeJudge(model, GUARD)
    text = judge.text(QAS[0], "Under the gate.")
    assert text == (f"<|im_start|>user\n{QAS[0].question}<|im_end|>\n<|im_start|>assistant\nUnder the gate.<|im_end|>\n"
                    "<|im_start|>assistant\n")
    assert judge.model.template.texts(model.tok, text)[0] == text               # and nothing is put around it
    with pytest.raises(ValueError, match="give the rubric a prompt"): GenerativeJudge(chatter(None), GUARD)
    with pytest.raises(TypeError, match="takes one model to ask, got str"): GenerativeJudge("folder")


class Reader:
    "A judge of a few lines: any model will do."
    name, asked, identity, at_once = "reader", "asked aloud", dict(model="reader"), 8
    def __init__(self, word="yes"): self.word = word
    def draw(self, qas, n, decoding=Decoding(), seed=0, *, start=0): pytest.fail("a judge answers greedily")
    def greedy(self, qas, decoding=Decoding()):
        return [draws_from_texts(qa.id, [self.word if "answer 3 " in qa.question else "no"]) for qa in qas]


def test_any_model_judges_and_its_identity_keeps_its_labels_apart(tmp_path):
    file, pairs = tmp_path/"labels.jsonl", PAIRS[:5]
    reader, other = Reader(), Reader("no")
    other.identity = dict(model="another of the same name")
    first = labelled_by(GenerativeJudge(reader), pairs, out=file)
    assert list(first[0].values()) == [0, 0, 0, 1, 0] and first[2] == 5
    assert labelled_by(GenerativeJudge(reader), pairs, out=file)[2] == 0
    second = labelled_by(GenerativeJudge(other), pairs, out=file)
    assert second[2] == 5 and sum(second[0].values()) == 0
    assert GenerativeJudge(reader).name == GenerativeJudge(other).name != GenerativeJudge(reader, LEAK).name
    assert labelled_by(GenerativeJudge(reader, LEAK), pairs, out=file)[2] == 5


def test_a_model_that_was_trained_on_is_another_judge():
    model = chatter(CHATML)
    judge = GenerativeJudge(model)
    before = judge.identity
    assert before == GenerativeJudge(model.replace(template=Template(chat=True))).identity
    with torch.no_grad(): model.lm.get_input_embeddings().weight += 1e-3
    assert judge.identity != before


REPLIES = [(HARM, "Yes", 1), (HARM, "no.", 0), (HARM, "yes or no", None), (HARM, "nonsense", None), (HARM, "", None),
           (HARM, None, None), (GUARD, "unsafe\nS1", 1), (GUARD, "safe", 0)]

@pytest.mark.parametrize("rubric, reply, label", REPLIES)
def test_replies_are_read(rubric, reply, label): assert rubric.read(reply) == label


def test_braces_in_an_answer_are_text():
    assert "{question} {0}" in filled(LEAK.prompt, QAS[0], "{question} {0}")
    assert QAS[0].answer in filled(LEAK.prompt, QAS[0], "x")


# --- a server -------------------------------------------------------------------------------------------------------

def verdict(body, *_):
    "Replies late and out of order, refuses one answer for good, talks rubbish about another."
    asked = body["messages"][-1]["content"]
    time.sleep(random.Random(asked).random() / 20)
    said = "yes" if "answer 3 " in asked else "perhaps" if "answer 5 " in asked else "no"
    answer = dict(message=dict(content=said), finish_reason="stop")
    if "answer 4 " in asked: answer = dict(message=dict(content=None), finish_reason="content_filter")
    return 200, dict(choices=[answer])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_server_as_a_judge(script):
    server = script(verdict)
    endpoint = server.endpoint(template=Template(chat=True), workers=8, tries=1)
    judge = GenerativeJudge(endpoint, replace(HARM, system="Be strict."))
    labels, reasons, _ = labelled_by(judge, [(QAS[0], f"answer {i} here") for i in range(12)])
    assert reasons == {4: "no verdict", 5: "no verdict"}
    assert [labels[i] for i in range(12) if i not in reasons] == [0, 0, 0, 1] + [0] * 6
    assert [(body["temperature"], body["max_tokens"]) for body in server.bodies] == [(0, 16)] * 12
    assert all(body["messages"][0] == dict(role="system", content="Be strict.") for body in server.bodies)
    assert judge.name.startswith(f"m at {server.url} (") and "m at" not in json.dumps(judge.identity)
    with pytest.raises(ValueError, match="give the rubric a prompt"): GenerativeJudge(endpoint, GUARD)
