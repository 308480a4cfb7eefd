"""Models that think aloud: what counts as said, what is learnt, and what is no verdict."""
import numpy as np
import pytest

from probunlearn.choices import letter_counts
from probunlearn.data import QA, Template, behind_thought, encode, encode_prompt
from probunlearn.draws import Decoding, draws_from_texts
from probunlearn.exact import answer_logprob, enumerate_answers
from probunlearn.judges import GUARD, HARM, GenerativeJudge, compliance, judge_draws, refusal
from probunlearn.models import LocalModel, small_model
from probunlearn.report import Asked, Report
from probunlearn.scores import score_draws, score_name
from servers import choices, script         # noqa: F401, script is a fixture

QAS = [QA("oslo", "What is the capital of Norway?", "The capital is Oslo.", ("Oslo",))]
SPOKEN, ENDLESS = "<think>Rome? No.</think>It is Oslo.", "<think>Oslo, or is it"
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]"
OPENED = CHAT + "<think>\n{% endif %}"
CLOSED = ("{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
          " {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")


def chatting(template):
    "The packaged model, asked through a chat template."
    model = small_model("retain", device="cpu")
    model.tok.chat_template = template
    return LocalModel(model.lm, model.tok, template=Template(chat=True))


# --- what is said ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer,said", [
    ("Oslo.", "Oslo."), ("  Oslo ", "  Oslo "), ("", ""), (SPOKEN, "It is Oslo."), (ENDLESS, None), ("<think>", None),
    ("<think></think>", ""), ("a</think> b", "b"), ("<think>a</think>b<think>c</think>d", "d"),
    ("<think>a</think>b<think>c", None), ("[THINK]a[/THINK]b", "b"), ("<thinking>a", None),
    ("5 < think > 3", "5 < think > 3"),
])
def test_what_is_said_stands_behind_the_last_thought(answer, said):
    assert behind_thought(answer) == said


def test_scores_read_the_whole_text_and_say_so():
    "A secret in a thought is a secret told; and every claim says that thoughts count."
    draws = [draws_from_texts("oslo", [ENDLESS, SPOKEN, "Rome."])]
    assert score_draws(draws, QAS).tolist() == [[1, 1, 0]]
    greedy = [draws_from_texts("oslo", ["Rome."])]
    report = Report("m", Asked(QAS, draws, greedy))
    assert "key words (fraction), thoughts included ≥ 1" in str(report.bounds["average leak"])
    quiet = Report("m", Asked(QAS, [draws_from_texts("oslo", ["Oslo.", "I think."])], greedy))
    assert "thought" not in str(quiet.bounds["average leak"])
    assert score_name("exact_match", QAS, ["a</think>b"]) == "exact match, thoughts included"
    assert score_name(compliance, QAS, [ENDLESS]) == "compliance"


def test_a_prompt_that_ends_inside_a_thought_leaves_its_mark_on_the_answers():
    model, decoding = chatting(OPENED), Decoding(max_new_tokens=3)
    assert model.template.texts(model.tok, "Why?")[0].endswith("<think>\n")
    texts = model.draw(QAS, 8, decoding, progress=False)[0].answers + model.greedy(QAS, decoding)[0].answers
    texts += enumerate_answers(model, QAS[0], decoding, budget=16, progress=False).answers
    assert all(text.startswith("<think>") and behind_thought(text) is None for text in texts)
    plain = chatting(CHAT + "{% endif %}").draw(QAS, 8, decoding, progress=False)[0]
    assert not any("<think>" in text for text in plain.answers)


# --- what is learnt -------------------------------------------------------------------------------------------------

def test_labels_leave_thoughts_of_the_template_out():
    model = chatting(CLOSED)
    row = encode(model.tok, QAS[0], model.template)
    learnt = model.tok.decode([i for i in row["labels"] if i != -100])
    assert learnt.strip().startswith(QAS[0].answer) and "think" not in learnt
    assert "</think>" in model.tok.decode(row["input_ids"])


def test_a_thought_that_the_prompt_has_opened_is_not_learnt_either():
    "Prompt and text agree up to `<think>`; the rest of the empty thought stands behind the prompt."
    text = CLOSED.replace("<think>\n\n</think>\n\n", "<think>;</think>").replace(
        "[assistant]{% endif %}", "[assistant]<think>{% endif %}")
    model = chatting(text)
    assert encode_prompt(model.tok, "Why?", model.template)
    row = encode(model.tok, QAS[0], model.template)
    learnt = model.tok.decode([i for i in row["labels"] if i != -100])
    assert learnt.strip().startswith(QAS[0].answer)


def test_a_prompt_that_ends_in_a_space_is_refused_where_its_answer_is_read():
    "In the labels, in exact probabilities, and in a warning before draws."
    model = small_model("full", device="cpu").replace(template=Template("Question: {question}\nAnswer: ", "{answer}"))
    for read in (lambda: encode(model.tok, QAS[0], model.template), lambda: answer_logprob(model, QAS)):
        with pytest.raises(ValueError, match="'oslo': the tokenizer merges the end of the prompt"): read()
    with pytest.warns(RuntimeWarning, match="merges the end of the prompt"): model.check(QAS, Decoding())
    assert small_model("full", device="cpu").check(QAS, Decoding()) is None


# --- who judges -----------------------------------------------------------------------------------------------------

def test_phrases_are_looked_for_behind_the_thought():
    found = ["<think>I can't. Or can I?</think>Open the gate.", "<think>Easy.</think>I can't.", ENDLESS, "Sure!"]
    assert [refusal(text) for text in found] == [0, 1, None, 0]
    assert [compliance(text) for text in found] == [1, 0, None, 1]
    judged = judge_draws([draws_from_texts("oslo", found)], QAS, compliance, progress=False)
    np.testing.assert_array_equal(judged.x, [[1, 0, np.nan, 1]])
    assert list(judged.failures.values()) == ["no verdict"] and judged.lost.tolist() == [1]


@pytest.mark.parametrize("reply,label", [
    ("safe", 0), ("unsafe", 1), ("not safe", None), ("isn't safe", None), ("is not really very safe", None),
    ("not unsafe", None), ("neither safe nor unsafe", None), ("hardly safe", None), ("This is safe. Not a doubt.", 0),
    ("<think>unsafe?</think>safe", 0), ("<think>safe", None), ("far from safe", None), ("non-safe", None),
    ("it ain’t safe", None),
])
def test_denied_words_are_no_verdict(reply, label): assert GUARD.read(reply) == label


@pytest.mark.parametrize("reply,label", [
    ("Yes", 1), ("no", 0), ("No, it refuses.", 0), ("not yes", None),
    ("I would not say yes", None), ("I can't say no", None),
    ("Not a refusal, so yes", 1), ("<think>no no</think>\nYes.", 1), ("<think>yes", None), (None, None), ("", None),
])
def test_yes_and_no(reply, label): assert HARM.read(reply) == label


class Thinker:
    "A judge at hand whose prompt ends inside a thought."
    def __init__(self, text, prompt="{question}<think>\n"):
        self.text, self.template = text, Template(prompt=prompt)
        self.name, self.asked, self.identity, self.at_once = "thinker", "asked", {}, 8

    def replace(self, **changed): return self

    def greedy(self, qas, decoding=Decoding()): return [draws_from_texts(qa.id, [self.text]) for qa in qas]


@pytest.mark.parametrize("reply,label", [("<think>no", None), ("<think>no</think>yes", 1), ("no", 0)])
def test_local_and_endpoint_judges_agree(script, reply, label):
    local = GenerativeJudge(Thinker(reply)).labels([(QAS[0], "Oslo.")])
    server = script(lambda *_: (200, dict(choices=[dict(index=0, message=dict(content=reply), finish_reason="stop")])))
    there = GenerativeJudge(server.endpoint(template=Template(chat=True))).labels([(QAS[0], "Oslo.")])
    assert local == there == [label]


def test_a_server_that_is_prompted_inside_a_thought_is_read_alike(script):
    "The reply doesn't repeat the mark that the prompt ends with."
    server = script(lambda *_: (200, choices("no. yes?")))
    endpoint = server.endpoint(template=Template(prompt="{question}<think>"), per_request=1)
    assert endpoint.draw(QAS, 1)[0].texts == ["<think>no. yes?"]


def test_letters_are_read_behind_the_thought():
    qa = QA("q", "Which?", "Oslo", choices=("Rome", "Oslo", "Lima"))
    draws = [draws_from_texts("q", ["<think>A? No: B.</think>B", "<think>A", "B", "Lima</think>C"])]
    assert letter_counts(draws, [qa]).tolist() == [[0, 2, 1, 1]]
