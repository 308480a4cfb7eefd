"""Judges: labels stay on their answers whatever a judge does, failures are counted and never safe, and real transformers models run through the same path."""
import json
import math
import random
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from conftest import random_lm
from probunlearn.bounds import binary_bound
from probunlearn.data import QA
from probunlearn.draws import draws_from_texts
from probunlearn.endpoint import Endpoint
from probunlearn.judges import (_kept, GUARD, HARM, LEAK, ClassifierJudge, EmbeddingJudge, EndpointJudge, FunctionJudge, GenerativeJudge, Rubric, calibrate_judge, compliance, entailment, filled,
                                judge_answers, judge_draws, refusal)
from probunlearn.report import Asked, Report
from test_data import CHATML, NO_SYSTEM, byte_bpe, chat_tokenizer

QAS = [QA(f"q{i}", f"Where is vault {i}?", f"Vault {i} lies under the gate.", category="near" if i else "far") for i in range(5)]
PAIRS = [(qa, f"answer {i} to {qa.id}") for qa in QAS for i in range(40)]


def truth(answer, qa=None): return float(answer.split()[1] in ("3", "7", "11"))     # what an answer's label should be


# --- order, failures, cost --------------------------------

class Unreliable:
    "Raises on a tenth of the answers, comes back out of order, talks rubbish: which answers depends on their text only, or anew at each call."
    batch_size, workers, name = 7, 6, "unreliable"

    def __init__(self, always, keyed):
        self.always, self.keyed, self.calls, self.rng, self.lock = always, keyed, [], random.Random(0), threading.Lock()

    def labels(self, pairs):
        with self.lock:
            self.calls += [answer for _, answer in pairs]
            moods = [random.Random(answer).random() if self.always else self.rng.random() for _, answer in pairs]
        time.sleep(max(moods) / 100)
        if min(moods) < .1: raise TimeoutError("no answer")
        found = [(i, random.Random(i).choice(["maybe", 7, math.nan, [], -1]) if mood < .2 else truth(answer)) for i, (mood, (_, answer)) in enumerate(zip(moods, pairs))]
        random.Random(len(self.calls)).shuffle(found)
        return dict(found) if self.keyed else [value for _, value in sorted(found, key=lambda pair: pair[0])]


@pytest.mark.parametrize("keyed", [True, False])
def test_labels_stay_on_their_answers(keyed):
    labels, reasons, asked = judge_answers(PAIRS, Unreliable(True, keyed), progress=False)
    doomed = {i for i, (_, answer) in enumerate(PAIRS) if random.Random(answer).random() < .2}
    assert asked == len(PAIRS) and set(reasons) == doomed and 10 < len(doomed) < 80
    assert all(math.isnan(labels[i]) if i in doomed else labels[i] == truth(PAIRS[i][1]) for i in range(len(PAIRS)))
    assert {reason.split(":")[0] for reason in reasons.values()} == {"TimeoutError", "rubbish"}


def test_what_fails_for_a_moment_is_asked_again():
    "With a fifth of failures at random, eight tries lose about one answer in 400,000."
    labels, reasons, _ = judge_answers(PAIRS, Unreliable(False, True), tries=8, progress=False)
    assert len(reasons) <= 1 and all(labels[i] == truth(answer) for i, (_, answer) in enumerate(PAIRS) if i not in reasons)


@pytest.mark.parametrize("found,reason", [(None, "no verdict"), ("0.3", "rubbish: '0.3' is no number"), (1.01, "rubbish: '1.01'"), (-.1, "rubbish"), (math.inf, "rubbish"), ([], "rubbish"), ({}, "rubbish")])
def test_what_is_no_label(found, reason):
    labels, reasons, _ = judge_answers(PAIRS[:2], lambda answer, qa: found if answer == PAIRS[0][1] else True, progress=False)
    assert math.isnan(labels[0]) and reasons[0].startswith(reason) and labels[1] == 1 and 1 not in reasons


@pytest.mark.parametrize("value", [True, np.bool_(True), np.float32(1), torch.tensor(1.), 1])
def test_what_is_a_label(value): assert judge_answers(PAIRS[:1], lambda answer, qa: value, progress=False)[0] == {0: 1.0}


class Sized:
    "Gives `size(n)` labels for n answers."
    batch_size, workers, name = 10, 1, "sized"
    def __init__(self, size): self.size, self.batches = size, []
    def labels(self, pairs):
        self.batches.append(len(pairs))
        return [truth(answer) for _, answer in pairs][:self.size(len(pairs))]


def test_too_few_labels_shift_nothing():
    judge = Sized(lambda n: n if n == 1 else n - 1)
    labels, reasons, _ = judge_answers(PAIRS[:20], judge, progress=False)
    assert sorted(judge.batches) == [1] * 20 + [10, 10]
    assert reasons == {} and [labels[i] for i in range(20)] == [truth(answer) for _, answer in PAIRS[:20]]


def test_a_judge_that_never_works_is_an_error():
    with pytest.raises(RuntimeError, match="judge sized failed on all 20 answers: rubbish: 0 labels for 1 answers"): judge_answers(PAIRS[:20], Sized(lambda n: 0), progress=False)


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
    judged = judge_draws(draws, qas, Counting(), progress=False)
    assert len(calls) == len(set(calls)) == judged.asked == sum(len(d.answers) for d in draws) <= 400 * 102 and judged.x.shape == (400, 1024)


def test_one_text_from_several_token_sequences_is_one_answer():
    draws = replace(draws_from_texts("q0", ["a", "b"]), answers=["same", "same"])
    judged = judge_draws([draws], QAS, lambda answer, qa: 1, progress=False)
    assert judged.asked == 1 and judged.x.tolist() == [[1, 1]]


def made(rates, n, rng, fails=0.):
    "Draws whose answers are harmful at the given rates, and a judge that raises on a share of the distinct answers."
    draws = [draws_from_texts(qa.id, [f"answer {'3' if bad else '0'} number {k}" for bad, k in zip(rng.random(n) < p, rng.integers(0, 60, n))]) for qa, p in zip(QAS, rates)]
    doomed = {(d.id, a) for d in draws for a in d.answers if rng.random() < fails}
    def judge(answer, qa):
        if (qa.id, answer) in doomed: raise OSError("gone")
        return truth(answer)
    return draws, judge


class Shaky:
    "Raises on a tenth of the distinct answers, talks rubbish about a twentieth, and hands its labels back in any order, from several threads."
    batch_size, workers, name = 16, 4, "shaky"
    def __init__(self, draws, rng): self.mood, self.rng = {(d.id, a): rng.random() for d in draws for a in d.answers}, random.Random(0)
    def labels(self, pairs):
        moods = [self.mood[qa.id, answer] for qa, answer in pairs]
        if min(moods) < .1: raise OSError("gone")
        found = [(i, "maybe" if mood < .15 else truth(answer)) for i, (mood, (_, answer)) in enumerate(zip(moods, pairs))]
        self.rng.shuffle(found)
        return dict(found)


def test_bounds_stay_valid_when_the_judge_fails():
    "In 500 runs both ends of the claims cover, and every verdict that came is right and every other named; counting failures as safe misses."
    rng, rates, alpha, runs = np.random.default_rng(2), np.array([.02, .2, .5, .9, .05]), .05, 500
    missed = np.zeros(3)
    for _ in range(runs):
        draws, _ = made(rates, 100, rng)
        judge = Shaky(draws, rng)
        judged = judge_draws(draws, QAS, judge, tries=2, progress=False)
        assert all(label == truth(key[1]) for key, label in judged.labels.items() if judge.mood[key] >= .15)
        assert {key: why.split(":")[0] for key, why in judged.failures.items()} == {key: "OSError" if mood < .1 else "rubbish" for key, mood in judge.mood.items() if mood < .15}
        frame = judged.to_frame(alpha)
        missed += (frame.lower > rates).any() or (frame.upper < rates).any(), float(judged.claims(alpha)["average leak"]) < rates.mean(), binary_bound(int(judged.flagged()[3]), 100, alpha).value < .9
    allowed = alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)
    assert missed[0] / runs <= allowed and missed[1] / runs <= allowed and missed[2] / runs > 3 * alpha


def test_the_report_says_what_failures_cost():
    draws, judge = made([.1] * 5, 200, np.random.default_rng(0), fails=.1)
    judged = judge_draws(draws, QAS, judge, tries=1, progress=False)
    low, high = judged.widening()
    assert low < high and judged.lost.sum() == np.isnan(judged.x).sum() > 0
    assert f"It failed on {len(judged.failures)} (OSError {len(judged.failures)}), {judged.lost.sum()} draws." in str(judged) and "instead of" in str(judged)
    whole = judge_draws(draws, QAS, truth, progress=False)
    assert "failed" not in str(whole) and whole.widening()[0] == whole.widening()[1]


def test_a_missing_draw_is_missing_not_failed():
    judged = judge_draws([draws_from_texts("q0", ["answer 3 x", None, "answer 0 x"])], QAS, truth, progress=False)
    assert judged.failures == {} and judged.lost.tolist() == [0] and np.isnan(judged.x).tolist() == [[False, True, False]]


def test_a_judge_goes_into_a_report():
    draws, judge = made([.1] * 5, 50, np.random.default_rng(1), fails=.1)
    judged = judge_draws(draws, QAS, judge, tries=1, progress=False)
    first = [draws_from_texts(qa.id, [next(a for a in d.answers if (d.id, a) not in judged.failures)]) for qa, d in zip(QAS, draws)]
    report = Report("librarian", Asked(QAS, judged.heard, first), score=judged.score)
    assert np.array_equal(report.x, judged.x, equal_nan=True) and f"{judged.lost.sum()} draws are missing" in " ".join(report.claims)


def test_sampled_text_is_escaped_and_folded():
    judged = judge_draws([draws_from_texts("q0", ["<script>alert(3)</script> answer"])], [QA("q0", "<b>Where?</b>", "x")], lambda answer, qa: 1, progress=False)
    html = judged._repr_html_()
    assert "<script>" not in html and "<b>" not in html and "&lt;script&gt;" in html and html.index("<details>") < html.index("&lt;script&gt;")


def test_labels_are_kept_and_belong_to_one_judge(tmp_path):
    draws, judge = made([.5] * 5, 50, np.random.default_rng(0))
    file, (a, b) = tmp_path/"labels.jsonl", (FunctionJudge(judge, "a"), FunctionJudge(lambda answer, qa: 0, "b"))
    first = judge_draws(draws, QAS, a, out=file, progress=False)
    assert judge_draws(draws, QAS, a, out=file, progress=False).asked == 0
    other = judge_draws(draws, QAS, b, out=file, progress=False)
    assert other.asked == first.asked and other.x.sum() == 0
    file.write_text(file.read_text()[:-3])                                              # a run that was killed while it wrote
    assert [judge_draws(draws, QAS, b, out=file, progress=False).asked for _ in range(2)] == [1, 0]


class Scale:
    "A judge whose strictness its name doesn't tell."
    def __init__(self, label): self.label = label
    def __call__(self, answer, qa): return self.label
    def judge(self, answer, qa): return self.label


def constant(label):
    def judge(answer, qa): return label
    return judge


@pytest.mark.parametrize("make", [lambda label: lambda answer, qa: label, lambda label: partial(refusal, phrases=(str(label),)), Scale, lambda label: Scale(label).judge, constant])
def test_a_judge_without_a_name_of_its_own_keeps_no_labels(make, tmp_path):
    "Else the second of two lambdas is never asked, and gets the labels of the first."
    draws, file = [draws_from_texts("q0", ["a", "b"])], tmp_path/"labels.jsonl"
    with pytest.raises(ValueError, match=r'pass FunctionJudge\(function, "a name of its own"\)'): judge_draws(draws, QAS, make(0.), out=file, progress=False)
    with pytest.raises(ValueError, match="a name of its own"): calibrate_judge(make(0.), [(QAS[0], "a", 0)])
    assert not file.exists() and judge_draws(draws, QAS, FunctionJudge(make(0.), "mine"), out=file, progress=False).asked == 2


def test_a_calibration_belongs_to_one_judge_and_threshold():
    "A judge that gives harmful answers 0.75: calibrated at 0.5 it catches all, at 0.9 none."
    def lenient(answer, qa): return .75 * truth(answer)
    draws, _ = made([.3] * 5, 50, np.random.default_rng(0))
    labelled = [(qa, text, truth(text)) for qa, d in zip(QAS, draws) for text in d.texts]
    judged, half, strict = judge_draws(draws, QAS, lenient, progress=False), calibrate_judge(lenient, labelled), calibrate_judge(lenient, labelled, .9)
    with pytest.raises(ValueError, match="about 'lenient' with harm_at=0.9, the calibration about 'lenient' with harm_at=0.5"): judged.claims(harm_at=.9, calibration=half)
    with pytest.raises(ValueError, match="the calibration about 'truth'"): judged.claims(calibration=calibrate_judge(truth, labelled))
    for at, calibration in ((.5, half), (.9, strict)):
        claims = judged.claims(harm_at=at, calibration=calibration)
        low, high = claims["average harm"].value
        assert list(claims) == ["average harm"] and low <= .3 <= high and f"judge: lenient ≥ {at}" in str(claims["average harm"])


def test_unmatched_draws_are_refused():
    with pytest.raises(ValueError, match="must belong to questions in qas, got \\['zz'\\]"): judge_draws([draws_from_texts("zz", ["a"])], QAS, truth)
    with pytest.raises(ValueError, match="same number of draws, got \\[1, 2\\]"): judge_draws([draws_from_texts("q0", ["a"]), draws_from_texts("q1", ["a", "b"])], QAS, truth)


def test_calibration_counts_failures():
    def judge(answer, qa): return None if answer == "answer 3 lost" else truth(answer)
    c = calibrate_judge(judge, [(QAS[0], "answer 3 a", 1), (QAS[0], "answer 0 a", 0), (QAS[0], "answer 3 lost", 1), (QAS[0], "answer 7 b", False)])
    assert (c.caught, c.missed, c.alarms, c.passed, c.lost_harmful, c.lost_harmless) == (1, 0, 1, 1, 1, 0)


# --- phrases --------------------------------

def test_phrases_by_name():
    draws = [draws_from_texts("q0", ["I can't.", "Under the gate.", ""])]
    assert [judge_draws(draws, QAS, name, progress=False).x.tolist() for name in ("refusal", "compliance")] == [[[1, 0, 0]], [[0, 1, 0]]]


@pytest.mark.parametrize("text,refuses", [("I’m sorry, I can’t do that.", 1), ("Sorry, no.", 1), ("As an AI, I will not.", 1), ("Under the gate.", 0), ("", 0), ("The gate. " * 30 + "I cannot say more.", 0)])
def test_refusal_phrases(text, refuses): assert refusal(text) == refuses and compliance(text) == (not refuses and text != "")


# --- models of transformers --------------------------------

def tiny(cls, **options):
    torch.manual_seed(0)
    tok = byte_bpe()
    tok.pad_token = tok.pad_token or "<pad>"
    tok.model_max_length = 10**9
    config = AutoConfig.for_model("bert", vocab_size=len(tok) + 8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64, pad_token_id=tok.pad_token_id,
                                  initializer_range=.4, **options)
    return cls.from_config(config).eval(), tok


LABELS = dict(id2label={0: "safe", 1: "UNSAFE", 2: "entailment"}, label2id={"safe": 0, "UNSAFE": 1, "entailment": 2})


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_a_real_classifier(kind, tmp_path):
    "Batched labels are those of one text at a time, from a folder as from memory; too long is no verdict."
    model, tok = tiny(AutoModelForSequenceClassification, problem_type=kind, **LABELS)
    model.save_pretrained(tmp_path); tok.save_pretrained(tmp_path)
    texts = ["A", "Under the gate of many words.", "no " * 200, "Nowhere"]
    found = ClassifierJudge(str(tmp_path), "unsafe", device="cpu").labels([(QAS[0], t) for t in texts])
    assert found[2] is None
    for text, label in zip(texts, found):
        if label is None: continue
        with torch.no_grad(): logits = model(**tok(text, return_tensors="pt")).logits[0]
        assert label == pytest.approx(float(logits.softmax(-1)[1] if kind.startswith("single") else logits.sigmoid()[1]), abs=1e-5)
    judged = judge_draws([draws_from_texts("q0", texts)], QAS, ClassifierJudge((model, tok), ("UNSAFE",)), progress=False)
    assert np.isnan(judged.x[0, 2]) and list(judged.failures.values()) == ["no verdict"]


def test_labels_that_a_classifier_does_not_have():
    with pytest.raises(ValueError, match="which are safe, UNSAFE, entailment; got toxic"): ClassifierJudge(tiny(AutoModelForSequenceClassification, **LABELS), "toxic")
    with pytest.raises(FileNotFoundError, match="Offline, download it"): ClassifierJudge("nobody/nothing", "toxic")


def test_entailment_reads_answer_and_reference():
    model, tok = tiny(AutoModelForSequenceClassification, **LABELS)
    found = entailment((model, tok)).labels([(QAS[0], "Under."), (QAS[1], "A gate, somewhere.")])
    for (qa, answer), label in zip([(QAS[0], "Under."), (QAS[1], "A gate, somewhere.")], found):
        with torch.no_grad(): assert label == pytest.approx(float(model(**tok(answer, qa.answer, return_tensors="pt")).logits[0].softmax(-1)[2]), abs=1e-5)


def test_embeddings_compare_meaning():
    judge = EmbeddingJudge(tiny(AutoModel))
    same, other = judge.labels([(QAS[0], QAS[0].answer), (QAS[0], "zzz")])
    assert same == pytest.approx(1, abs=1e-5) and 0 <= other < same


class Scripted(GenerativeJudge):
    "A real judge whose replies are replaced: what it is shown stays real."
    def replies(self, texts):
        self.shown = texts
        return ["yes" if "answer 3" in t else "no" for t in texts]


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, None])
def test_a_real_generative_judge(template):
    "A random model: it says something, mostly no verdict; batched replies are those of one text at a time."
    lm = random_lm("llama", vocab=400, dtype=torch.float32, max_position_embeddings=1024)
    tok = chat_tokenizer(template)
    tok.pad_token = tok.pad_token or tok.eos_token
    lm.resize_token_embeddings(len(tok))
    judge = GenerativeJudge((lm, tok), Rubric("Asked {question}, said {answer}: harm?", system="Be strict."), max_new_tokens=4)
    texts = [judge.text(qa, answer) for qa, answer in PAIRS[:5:2]]
    assert all("Be strict." in t and "said answer" in t for t in texts) and judge.chat == (template is not None)
    assert judge.replies(texts) == [judge.replies([t])[0] for t in texts]
    labels, reasons, _ = judge_answers(PAIRS[:4] + [(QAS[0], "long " * 2000)], FunctionJudge(lambda answer, qa: judge.labels([(qa, answer)])[0] if "long" in answer else 0.), progress=False)
    assert reasons == {4: "no verdict"} and labels[0] == 0
    scripted = Scripted((lm, tok), judge.rubric)
    assert scripted.labels(PAIRS[:5]) == [0, 0, 0, 1, 0]


def test_a_judge_is_decoded_greedily_whatever_its_own_settings_say():
    "Published judges come with sampling and repetition penalties switched on."
    lm, tok = random_lm("llama", vocab=400, dtype=torch.float32, max_position_embeddings=1024), chat_tokenizer(CHATML)
    lm.resize_token_embeddings(len(tok))
    judge = GenerativeJudge((lm, tok))
    texts = [judge.text(qa, answer) for qa, answer in PAIRS[:3]]
    plain = judge.replies(texts)
    for name, value in dict(do_sample=True, temperature=5., top_k=3, top_p=.5, repetition_penalty=3.).items(): setattr(lm.generation_config, name, value)
    assert judge.replies(texts) == plain


def test_a_guard_judges_the_conversation():
    lm, tok = random_lm("llama", vocab=400, dtype=torch.float32), chat_tokenizer(CHATML)
    text = GenerativeJudge((lm, tok), GUARD).text(QAS[0], "Under the gate.")
    assert text == f"<|im_start|>user\n{QAS[0].question}<|im_end|>\n<|im_start|>assistant\nUnder the gate.<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="give the rubric a prompt"): GenerativeJudge((lm, chat_tokenizer(None)), GUARD)


@pytest.mark.parametrize("rubric,reply,label", [(HARM, "Yes", 1), (HARM, "no.", 0), (HARM, "yes or no", None), (HARM, "nonsense", None), (HARM, "", None), (HARM, None, None), (GUARD, "unsafe\nS1", 1), (GUARD, "safe", 0)])
def test_replies_are_read(rubric, reply, label): assert rubric.read(reply) == label


def test_braces_in_an_answer_are_text():
    assert "{question} {0}" in filled(LEAK.prompt, QAS[0], "{question} {0}") and QAS[0].answer in filled(LEAK.prompt, QAS[0], "x")


# --- a server --------------------------------

class Server(BaseHTTPRequestHandler):
    "Replies late and out of order, refuses one answer for good, talks rubbish about another."
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        time.sleep(random.Random(asked).random() / 20)
        said = "yes" if "answer 3 " in asked else "perhaps" if "answer 5 " in asked else "no"
        choice = dict(index=0, message=dict(content=None if "answer 4 " in asked else said), finish_reason="content_filter" if "answer 4 " in asked else "stop")
        body = json.dumps(dict(choices=[choice])).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *args): pass


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_server_as_a_judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        judge = EndpointJudge(Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "judge", workers=8, tries=1))
        labels, reasons, _ = judge_answers([(QAS[0], f"answer {i} here") for i in range(12)], judge, progress=False)
    finally: server.shutdown(); server.server_close()
    assert reasons == {4: "no verdict", 5: "no verdict"} and [labels[i] for i in range(12) if i not in reasons] == [0, 0, 0, 1] + [0] * 6
    with pytest.raises(ValueError, match="give the rubric a prompt"): EndpointJudge(judge.endpoint, GUARD)


def test_a_cut_off_line_of_kept_labels_is_cut_away(tmp_path):
    "The whole lines stay as they are, byte for byte; text that only Unicode calls a line end parts no row."
    file, whole = tmp_path/"labels.jsonl", '{"key": "a\u2028b", "label": 1.0}\n{"key": "c", "label": 0.0}\n'.encode()
    file.write_bytes(whole + b'{"key": "d", "la')
    assert _kept(file) == {"a\u2028b": 1.0, "c": 0.0} and file.read_bytes() == whole
