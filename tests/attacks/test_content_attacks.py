"""What questions, answers, names and templates may hold: scripts stay text, loops end, half a character is named."""
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from parrot import QAS, SHORT, Parrot
from probunlearn import limits
from probunlearn.data import QA, Template, load_qa
from probunlearn.evaluation import evaluate
from probunlearn.files import visible
from probunlearn.models import LocalModel, small_model
from probunlearn.report import Board
from test_data import chat_tokenizer

# --- pages ------------------------------------------------------------------------------------------------------------

SCRIPTS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</td><script>alert(1)</script>",
    "<svg onload=alert(1)>",
           "\"><script>alert(1)</script>",
           "'><b onclick=alert(1)>",
           "<a href='javascript:alert(1)'>x</a>",
           "</title><script>alert(1)</script>",
           "</style><script>alert(1)</script>",
           "<iframe src=http://evil></iframe>",
           "{{ 7 * 7 }}<script>",
           "$name ${evil} <script>",
           "<!-- <script> -->",
           "&lt;script&gt;<script>",
           "<scr\x00ipt>alert(1)</script>",
           "<base href=http://evil/>",
           "<meta http-equiv=refresh content=0>"]
PLACES = ["answer", "question", "reference", "keyword", "name", "id", "about"]


class Tags(HTMLParser):
    "The tags and attributes of a page."
    def __init__(self):
        super().__init__()
        self.seen, self.names = [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.names |= {name for name, _ in attrs}
        self.names |= {"javascript" for _, value in attrs if value and value.strip().lower().startswith("javascript")}


def placed(place, text):
    "A report where a text stands in one place."
    qa = QAS[0]
    if place == "question": qa = replace(qa, question=f"Where {text}?")
    if place == "reference": qa = replace(qa, answer=f"There {text}.")
    if place == "keyword": qa = replace(qa, keywords=(text,))
    if place == "id": qa = replace(qa, id=text)
    model = Parrot(lambda qa, i: f"I say {text} {i % 2}" if place == "answer" else qa.answer)
    about = text if place == "about" else ""
    return evaluate(model, [qa], 4, decoding=SHORT, name=text if place == "name" else "m", about=about, progress=False)


def tags(page):
    found = Tags()
    found.feed(page)
    return sorted(found.seen), found.names


def check_tags(place, text):
    "A page has the tags that it has with a harmless text in the same place."
    report = placed(place, text)
    found, names = tags(report.body())
    assert (found, names) == tags(placed(place, "harmless").body()) and "javascript" not in names
    assert not {name for name in names if name.startswith("on")}
    card = report.card()
    assert "<script" not in card and "<img src=x" not in card and "<iframe" not in card


@pytest.mark.parametrize("text", SCRIPTS)
@pytest.mark.parametrize("place", PLACES)
def test_no_text_becomes_a_tag(place, text, monkeypatch):
    monkeypatch.setattr("probunlearn.page.picture", lambda plot, size, **how: (b"<svg></svg>", "a figure"))
    check_tags(place, text)


@pytest.mark.parametrize("place", PLACES)
def test_no_text_becomes_a_tag_in_a_drawing(place):
    "All of them in one report, as drawings take their time."
    shown = placed(place, " ".join(SCRIPTS)).body()
    found, names = tags(shown)
    assert not {"script", "img", "iframe", "base", "meta"} & {*found} - {*tags(placed(place, "harmless").body())[0]}
    assert "javascript" not in names and not {name for name in names if name.startswith("on")}


# --- files of records -------------------------------------------------------------------------------------------------

ROWS = {        # what a file holds → what is said
    '{"question": "half \\ud800", "answer": "x"}': "half a character",
    '{"question": "x", "answer": "\\udc00"}': "half a character",
    '{"question": "x", "answer": "y", "keywords": ["\\ud800"]}': "half a character",
    '{"question": "x", "answer": "y", "id": "\\ud800"}': "half a character",
    '{"question": null, "answer": "y"}': "QA.question must be",
    '{"question": [], "answer": "y"}': "QA.question must be",
    '{"question": true, "answer": "y"}': "QA.question must be",
    '{"question": "x", "answer": {"a": 1}}': "QA.answer must be",
    '{"question": "x", "answer": "y", "keywords": {"a": 1}}': "QA.keywords must be",
    '{"question": "x", "answer": "y", "keywords": [[]]}': "QA.keywords must be",
    '{"question": "x", "answer": "y", "keywords": true}': "QA.keywords must be",
    '{"question": "x", "answer": "y", "id": []}': "QA.id must be",
    '{"question": "x", "answer": "y", "id": {"a": 1}}': "QA.id must be",
    '{"question": "x", "answer": "y", "alternatives": [1, null]}': "QA.alternatives must be",
    '{"question": "x", "answer": 9, "choices": ["a", "b"]}': "no number of its 2 choices",
    '{"question": "x", "answer": -1, "choices": ["a"]}': "no number of its 1 choices",
    '{"question": "x", "answer": "c", "choices": ["a", "b"]}': "must be one of its choices",
    '{"a": 1}': "no column question",
    "[]": "holds no rows",
    "{}": "no column question",
    '["text"]': "a text without a question",
    "[[1]]": "is not a JSON object",
    '{"question": "x"}': "no column answer",
    '{"question": "   ", "answer": "y"}': "QA.question must be",
    '{"question": "x", "answer": "  "}': "QA.answer must be",
    "\ufeff": "holds no rows",
    "nonsense": "is not a JSON object",
    '{"question": NaN, "answer": "y"}': "QA.question must be",
    '{"question": "x", "answer": "y", "paraphrased_question": [1]}': "QA.paraphrased_question",
    '{"question": "x", "answer": "y", "category": [1]}': "QA.category",
}


@pytest.mark.parametrize("words", ROWS, ids=ascii)
def test_a_record_that_is_none_is_named_with_its_file(words, tmp_path):
    file = tmp_path/"records.jsonl"
    file.write_text(words, encoding="utf-8")
    with pytest.raises(ValueError, match=ROWS[words]) as error: load_qa(file)
    assert "records.jsonl" in str(error.value)


BYTES = {
    "latin-1": "ä".encode("latin-1"),
    "binary": bytes(range(256)),
    "zeros": b"\0" * 100,
    "utf-16 torn": b"\xff\xfe\x00",
    "utf-16": "\ufeffhello".encode("utf-16"),
         "gzip": b"\x1f\x8b\x08\x00" + bytes(50), "half a letter": "ü".encode()[:1]}


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv"])
def test_bytes_that_are_no_text(kind, suffix, tmp_path):
    file = tmp_path/f"records{suffix}"
    file.write_bytes(BYTES[kind])
    with pytest.raises(ValueError) as error: load_qa(file)
    assert f"records{suffix}" in str(error.value)


@pytest.mark.parametrize("part", ["prompt", "answer", "system"])
def test_a_template_with_half_a_character_is_refused(part):
    odd = dict(prompt="\ud800 {question}", answer="{answer} \udc00", system="\ud800")
    with pytest.raises(ValueError, match="half a character"): Template(**{part: odd[part]})


def test_a_model_at_hand_names_the_question_that_it_cannot_read():
    with pytest.raises(ValueError, match="'half .* of it' holds half a character"):
        small_model("retain").draw([QA("q", "half \ud800 of it", "x")], 1)


# --- chat templates ---------------------------------------------------------------------------------------------------

LONG, LARGE, MUCH = "runs longer than", "needs more memory", "writes more than"
CHATS = {
    "nested loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", LONG),
    "loops in a macro": (
        "{% macro f(n) %}{% for i in range(99999) %}{{ f(n - 1) if n else '' }}{% endfor %}{% endmacro %}{{ f(3) }}",
        LONG),
    "doubling": (
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        f"{LARGE}|{LONG}"),
    "a product": ("{{ 'a' * 10**10 }}", LARGE), "a product that is thrown away": ("{% set x = 'a' * 10**10 %}", LARGE),
    "a centred word": ("{{ 'a' | center(10**10) }}", LARGE), "a wide number": ("{{ '%10000000000d' % 1 }}", LARGE),
    "a power": ("{{ 10 ** (10 ** 9) }}", f"{LONG}|{LARGE}"),
    "much text": ("{% for i in range(99999) %}{{ messages[0].content * 99 }}{% endfor %}", f"{MUCH}|{LONG}"),
    "a long list": ("{% set x = [1] * 10**10 %}", LARGE),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_template_without_end_or_measure_is_stopped(name, monkeypatch, full):
    monkeypatch.setattr(limits, "_SECONDS", 1)
    template, sentence = CHATS[name]
    tok = chat_tokenizer(template + "{% for m in messages %}{{ m.content }}{% endfor %}")
    model = LocalModel(full.lm, tok)
    with pytest.raises(ValueError, match=f"the chat template ({sentence}).*Pass a plain template"): model.draw(QAS, 1)
    with pytest.raises(ValueError, match="the chat template"): model.identity


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
    "{% include '/etc/passwd' %}",
           "{{ messages.append({}) }}",
           "{{ self.__init__.__globals__ }}",
           "{% import 'os' as os %}{{ os }}",
           "{{ raise_exception('no') }}",
           "{{ nothing.at.all }}",
           "{% if %}"]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_gets_out_of_nothing(template, full, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = LocalModel(full.lm, chat_tokenizer(template + "{{ messages[0].content }}"))
    try: prompt = model.template.texts(model.tok, "why?")[0]
    except Exception as e: assert "Traceback" not in str(e)
    else: assert "root:" not in prompt and "globals" not in prompt
    assert not (tmp_path/"owned").exists()


def test_an_honest_chat_template_writes_what_it_wrote_before(full):
    for template in ("{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
                     "{% if add_generation_prompt %}<assistant>{% endif %}",
                     "{{ messages | tojson }}{% generation %}x{% endgeneration %}{{ strftime_now('%Y') }}"):
        tok = chat_tokenizer(template)
        messages = [dict(role="user", content="why?")]
        expected = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert limits.render_chat(tok, messages, add_generation_prompt=True) == expected


# --- terminals --------------------------------------------------------------------------------------------------------

CONTROLS = ["\x1b[2J", "\x9b31m", "\r", "\x08\x08", "\x00", "\x07", "\u202e", "\u2066", "\ud800", "\x7f", "\x85"]


@pytest.mark.parametrize("odd", CONTROLS, ids=ascii)
def test_what_a_terminal_obeys_is_shown_as_its_code(odd):
    assert visible(f"a{odd}b").isprintable() and visible(f"a{odd}b").startswith("a\\")
    assert visible("Ünïcode, 漢字, עברית\n\t🙂") == "Ünïcode, 漢字, עברית\n\t🙂"


@pytest.mark.parametrize("odd", ["\x1b[2J", "\u202e", "\r"], ids=ascii)
def test_a_name_paints_over_nothing(odd):
    report = evaluate(Parrot(), QAS, 4, decoding=SHORT, name=f"evil{odd}", progress=False)
    for shown in (str(report), str(Board([report])), "\n".join(report.claims)): assert odd not in shown


def test_a_report_is_a_screen():
    report = evaluate(Parrot(lambda qa, i: "long " * 500 + str(i)), QAS, 64, decoding=SHORT, progress=False)
    assert len(str(report)) < 6000 and len(str(report).splitlines()) < 40
