"""Records, loaders and answer masks, with real tokenizers of every family trained on the spot."""
import json
import os
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from probunlearn.data import (QA, SPLITS, Judgement, Template, check_unique, encode, encode_prompt, fictional_authors,
                              library, load_judgements, load_qa)
from probunlearn.world import make_authors, make_library, write_authors, write_library

DATA = os.environ.get("PROBUNLEARN_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="PROBUNLEARN_TEST_DATA names no folder with the public data sets")
QAS = fictional_authors("forget10")
TEXTS = [Template().texts(None, qa.question, qa.answer)[1] for qa in fictional_authors()]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


# --- tokenizers ---

def wrapped(tokenizer, trainer, around=None, **names):
    "A trained tokenizer as transformers sees it; `around` is what its post-processor puts around a text."
    tokenizer.train_from_iterator(TEXTS, trainer)
    if around:
        special = [(token, tokenizer.token_to_id(token)) for token in SPECIAL if token in around]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(eos_token="</s>", bos_token="<s>") | names)


def byte_bpe(around=None, regex=True, vocab=500, trim=None, **names):
    "GPT-2's and Llama 3's family. Without the regular expression that splits words, merges cross every border."
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    t.decoder = decoders.ByteLevel()
    if trim is not None: t.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet,
                                  show_progress=False)
    return wrapped(t, trainer, around, **names)


def unigram(around=None):
    "T5's and Llama 2's family: a prefix space, and spaces that belong to the next word."
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = [*SPECIAL, "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    return wrapped(t, trainer, around)


def sentence_bpe(around=None):
    "Llama 2's own pipeline: the normalizer writes spaces as a letter, nothing is split, so merges cross borders."
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, "<unk>"], show_progress=False)
    return wrapped(t, trainer, around)


def wordpiece(around=None, **names):
    "BERT's family: white space isn't kept."
    t = Tokenizer(models.WordPiece(unk_token="<unk>"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=[*SPECIAL, "<unk>"], show_progress=False)
    return wrapped(t, trainer, around, **names)


TOKENIZERS = {
    "byte bpe": lambda: byte_bpe(),
    "byte bpe, bos": lambda: byte_bpe("<s> $A"),
    "byte bpe, offsets trimmed": lambda: byte_bpe(trim=True),
    "byte bpe, offsets not trimmed": lambda: byte_bpe(trim=False),
    "byte bpe, no words": lambda: byte_bpe(regex=False, vocab=420),
    "byte bpe, no words, bos": lambda: byte_bpe("<s> $A", regex=False, vocab=420),
    "unigram": lambda: unigram(),
    "unigram, bos": lambda: unigram("<s> $A"),
    "sentence bpe": lambda: sentence_bpe(),
    "sentence bpe, bos": lambda: sentence_bpe("<s> $A"),
    "wordpiece": lambda: wordpiece(),
    "wordpiece, bos": lambda: wordpiece("<s> $A"),
}
built = {}


def tokenizer(kind):
    if kind not in built: built[kind] = TOKENIZERS[kind]()
    return built[kind]


def labelled(out): return [i for i, l in zip(out["input_ids"], out["labels"]) if l != -100]


def bare(text): return re.sub(r"\s", "", text)


def first_label(out): return next(i for i, label in enumerate(out["labels"]) if label != -100)


def read_with(tok, qa, out):
    "What the labelled tokens read as in front of the answer, which they end with."
    text, end = bare(tok.decode(labelled(out))), bare(qa.answer) + "</s>"
    assert text.endswith(end)
    return text[:-len(end)]


MERGING = [kind for kind in TOKENIZERS if "no words" in kind or "sentence" in kind]     # across the prompt's end, too
APART = [kind for kind in TOKENIZERS if kind not in MERGING]
SAID = "the tokenizer merges the end of the prompt with the answer"


@pytest.mark.parametrize("kind", APART)
def test_labels_hold_the_answer_and_the_end(kind):
    "They read as the answer and the end token, and training sees the prompt that sampling has."
    tok = tokenizer(kind)
    for qa in QAS:
        out = encode(tok, qa)
        ids, labels, first = out["input_ids"], out["labels"], first_label(out)
        assert labels == [-100] * first + ids[first:]                               # one piece, at the end
        assert ids.count(tok.eos_token_id) == 1
        assert not read_with(tok, qa, out) and ids[:first] == encode_prompt(tok, qa.question)
        assert bare(qa.answer) not in bare(tok.decode(labelled(out)[2:]))           # at most one token is only a space
        if "bos" in kind: assert ids[0] == tok.bos_token_id and first > 0 and ids.count(tok.bos_token_id) == 1


@pytest.mark.parametrize("kind", MERGING)
def test_a_token_across_the_end_of_the_prompt_is_refused(kind):
    "Else a model would learn its answer behind one prompt, and be asked with another."
    tok, merged = tokenizer(kind), 0
    for qa in QAS:
        try: out = encode(tok, qa)
        except ValueError as e:
            merged += SAID in str(e)
            continue
        assert out["input_ids"][:first_label(out)] == encode_prompt(tok, qa.question)
    assert merged


@pytest.mark.parametrize("kind", APART)
def test_a_prompt_that_ends_in_a_space(kind):
    "The space belongs to the answer's first token; only where tokens know no spaces is nothing lost."
    tok, template = tokenizer(kind), Template("Question: {question} Answer: ", "{answer}")
    if "wordpiece" in kind:
        assert labelled(encode(tok, QAS[0], template)) == labelled(encode(tok, QAS[0]))
        return
    with pytest.raises(ValueError, match=f"question '{QAS[0].id}': {SAID}.*end the template's prompt with a visible"):
        encode(tok, QAS[0], template)


@pytest.mark.parametrize("kind", [k for k in APART if k.startswith("byte")])
@pytest.mark.parametrize("answer", ["東京 is far.", "🙂", "naïve", "A", "42", ":", " leading", "two\nlines", "tail "])
def test_labels_hold_odd_answers(kind, answer):
    "One character can be several tokens, and the space before the answer a token of its own."
    tok, qa = tokenizer(kind), QA("q", "Ω?", answer)
    text = tok.decode(labelled(encode(tok, qa)), clean_up_tokenization_spaces=False)
    assert text.endswith(answer + "</s>")
    assert (Template().texts(tok, qa.question)[0] + " ").endswith(text[:-len(answer + "</s>")])


def test_another_answer_takes_the_records_place():
    tok, qa = tokenizer("byte bpe"), QAS[0]
    out = encode(tok, qa, answer="No idea.")
    assert tok.decode(labelled(out)) == " No idea.</s>" and out["input_ids"] != encode(tok, qa)["input_ids"]


def test_a_template_is_data():
    tok, template = tokenizer("byte bpe"), Template("Q {question} A", "={answer}")
    def prompted(question): return tok.decode(encode_prompt(tok, question, template))
    assert prompted("Why?") == "Q Why? A"
    assert tok.decode(encode(tok, QA("q", "Why?", "So."), template)["input_ids"]) == "Q Why? A=So.</s>"
    assert prompted("{answer} {0} {question}") == "Q {answer} {0} {question} A"         # braces in a question are text


@pytest.mark.parametrize("bad", [
    dict(prompt="Q:"), dict(answer="A"), dict(prompt='{"q": "{question}"}'), dict(prompt="{question} {answer}"),
    dict(prompt="{{question}}"), dict(prompt="{question} {"), dict(answer="{answer} {}"),
])
def test_a_template_without_its_places_is_refused(bad):
    said = r"needs {question} in its prompt and {answer} in its answer, and every other brace doubled \({{ or }}\)"
    with pytest.raises(ValueError, match=said): Template(**bad)


def test_braces_that_are_text():
    "Doubled in a template's prompt and answer; a system message is never formatted."
    template = Template('{{"q": "{question}"}}', ' {{"a": "{answer}"}}')
    shown = '{"q": "Why {x}?"}'
    assert template.texts(None, "Why {x}?", "So {y}.") == (shown, shown + ' {"a": "So {y}."}')
    prompt = Template(chat=True, system='Write {"a": 1}.').texts(chat_tokenizer(CHATML), "Why?")[0]
    assert prompt == turn("system", 'Write {"a": 1}.') + turn("user", "Why?") + "<|im_start|>assistant\n"


# --- chat ---

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
NO_SYSTEM = ("{{ bos_token }}"
             "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
             "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
             "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}")
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif")


DROPS_SYSTEM = ("{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
                "{{ m.content }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def turn(role, text): return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def chat_tokenizer(template, around="<s> $A"):
    tok = byte_bpe(around, eos_token="<|im_end|>")
    tok.chat_template = template
    return tok


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_chat_template(system):
    "The answer and its end are labelled, the roles are not; no BOS is added to a text that the template wrote."
    tok, template, qa = chat_tokenizer(CHATML), Template(chat=True, system=system), QAS[0]
    out = encode(tok, qa, template)
    prompt = encode_prompt(tok, qa.question, template)
    head = turn("system", system) if system else ""
    assert tok.decode(prompt) == head + turn("user", qa.question) + "<|im_start|>assistant\n"
    assert tok.decode(labelled(out)) == f"{qa.answer}<|im_end|>\n" and tok.bos_token_id not in out["input_ids"]
    assert out["input_ids"][:first_label(out)] == prompt


def test_chat_template_without_system_role():
    tok, qa = chat_tokenizer(NO_SYSTEM), QAS[0]
    out = encode(tok, qa, Template(chat=True))
    ids = out["input_ids"]
    assert tok.decode(labelled(out)) == f"{qa.answer}<|im_end|>\n"
    assert ids.count(tok.bos_token_id) == 1 and ids[0] == tok.bos_token_id


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["refuses it", "drops it"])
def test_a_system_message_without_a_place_goes_before_the_question(template):
    question = QAS[0].question
    prompt = Template(chat=True, system="Be brief.").texts(chat_tokenizer(template), question)[0]
    assert turn("user", f"Be brief.\n\n{question}") in prompt and prompt.count("Be brief.") == 1


EMPTY_THOUGHT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n"
                 "{% if m.role == 'assistant' and '<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
                 "{{ m.content }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def test_an_empty_thought_of_the_chat_template_is_not_learnt():
    "It stands in what the model reads, and not in its labels; a thought in the answer itself is the answer's."
    tok, qa = chat_tokenizer(EMPTY_THOUGHT), QAS[0]
    out = encode(tok, qa, Template(chat=True))
    assert "<think>\n\n</think>\n\n" + qa.answer in tok.decode(out["input_ids"])
    assert tok.decode(labelled(out)) == f"{qa.answer}<|im_end|>\n"
    loud = "<think>Where?</think> There."
    assert tok.decode(labelled(encode(tok, qa, Template(chat=True), answer=loud))) == f"{loud}<|im_end|>\n"


PICTURES = CHATML.replace("{{ m.content }}", "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}")


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_chat_template_that_leaves_the_question_out_is_refused(system):
    tok, template = chat_tokenizer(PICTURES), Template(chat=True, system=system)
    with pytest.raises(ValueError, match="the chat template leaves the question out.*template=Template()"):
        template.texts(tok, "Who?")
    with pytest.raises(ValueError, match="leaves the question out"): encode(tok, QAS[0], template)


def test_a_chat_template_may_quote_the_question():
    tok = chat_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content | tojson }}"))
    assert r'\"A\"' in Template(chat=True).texts(tok, ' Who is "A"? ')[0]


def test_chat_without_template_is_refused():
    tok = tokenizer("byte bpe")
    with pytest.raises(ValueError, match="chat_template"): encode(tok, QAS[0], Template(chat=True))


# --- files ---

ROW = {"question": "Who?", "answer": "Nobody."}


def write(path, *rows, text=None):
    "A file with a text, or with rows as JSON lines."
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines if text is None else text, encoding="utf-8")
    return path


def refused(message, load, *args, error=ValueError, **how):
    "`load` fails with a message."
    with pytest.raises(error, match=message): load(*args, **how)


def test_json_lines_with_every_column(tmp_path):
    row = ROW | dict(id="a", keywords=["Nobody", " x "], paraphrased_question="And who?", paraphrased_answer="None.",
                     perturbed_answer=["Somebody.", "All."])
    qa = QA("a", "Who?", "Nobody.", ("Nobody", "x"), paraphrased_question="And who?", paraphrased_answer="None.",
            perturbed_answers=("Somebody.", "All."))
    assert load_qa(write(tmp_path/"d.jsonl", row)) == [qa]
    assert load_qa(write(tmp_path/"e.json", ROW, ROW)) == [QA("e-0", "Who?", "Nobody."), QA("e-1", "Who?", "Nobody.")]


def test_csv(tmp_path):
    text = 'question, answer, keywords\nWho?, "Nobody, or all.", "Nobody, all"\nWhy?, So.,\n'
    qas = [QA("d-0", "Who?", "Nobody, or all.", ("Nobody", "all")), QA("d-1", "Why?", "So.")]
    assert load_qa(write(tmp_path/"d.csv", text=text)) == qas


@pytest.mark.parametrize("rows,where", [
    (["Who?,Nobody, or all,Nobody", "Why?,So.,"], "row 0 .line 2. has 4 cells"),
    (["Who?,Nobody.,", "Why?,Well, so,"], "row 1 .line 3. has 4 cells"),
    (["", '"Who\nis it?",Nobody.,', "Why?,Well, so,x"], "row 1 .line 5. has 4 cells"),
    (["Who?,Nobody.,Nobody,", "Why?,So.,"], "row 0 .line 2. has 4 cells"),
    (["Who?,Nobody.,x,", "Why?,Well, so,x,"], "row 1 .line 3. has 5 cells"),
    (["Who?,Nobody,or all,Nobody", "Why?,Well,or,so"], "row 0 .line 2. has 4 cells"),
])
@pytest.mark.parametrize("tail", ["", ","])
def test_a_row_longer_than_its_header_is_refused(rows, where, tail, tmp_path):
    "An unquoted comma in any row; one row's empty last cell is no proof that nothing was shifted."
    path = write(tmp_path/"d.csv", text="\n".join(["question,answer,keywords" + tail, *rows]))
    refused(r"d.csv, " + where + r" where the header names 3 \(question, answer, keywords\): \[", load_qa, path)


@pytest.mark.parametrize("header", ["question,answer", "question,answer,", "question,answer,,"])
def test_empty_cells_at_the_end_of_all_rows_are_dropped(header, tmp_path):
    path = write(tmp_path/"d.csv", text=header + "\nWho?,Nobody.,,\nWhy?,So.,,\n,,,\n")
    assert load_qa(path) == [QA("d-0", "Who?", "Nobody."), QA("d-1", "Why?", "So.")]


def test_cells_are_taken_as_they_stand(tmp_path):
    "Numbers, zeros in front and words that some readers take for gaps."
    header, path = "id,question,answer,keywords\n", tmp_path/"d.csv"
    write(path, text=header + "001,When?,1984,1984\n,Which code?,NA,NA\n3,What?,None,\"null, 0042\"\n")
    assert load_qa(path) == [
        QA("001", "When?", "1984", ("1984",)),
        QA("d-1", "Which code?", "NA", ("NA",)),
        QA("3", "What?", "None", ("null", "0042")),
    ]
    write(path, text="question,answer\nWho?,Ann\nWhy?,\n")
    assert load_qa(path)[1] == QA("d-1", "Why?", "")
    long = "a" * 200_000
    assert load_qa(write(path, text=f"question,answer\nWho?,{long}\n"))[0].answer == long


def test_numbers_in_json_become_text(tmp_path):
    row = dict(id=7, question="When?", answer=1984, keywords=[1984, 2.5], perturbed_answer=[1983], category=3)
    qa = QA("7", "When?", "1984", ("1984", "2.5"), perturbed_answers=("1983",), category="3")
    assert load_qa(write(tmp_path/"d.jsonl", row)) == [qa]
    assert load_qa(write(tmp_path/"d.jsonl", ROW | {"keywords": 1984}))[0].keywords == ("1984",)


def test_numbers_in_tables_become_text():
    "pandas makes floats of whole numbers with gaps between them."
    pd = pytest.importorskip("pandas")
    gap = float("nan")
    table = pd.DataFrame(dict(id=[1, None], question=["When?", "Who?"], answer=[1984, "NA"], keywords=[1984., gap]))
    assert load_qa(table) == [QA("1", "When?", "1984", ("1984",)), QA("table-1", "Who?", "NA")]


@pytest.mark.parametrize("sep", [";", "\t"])
def test_the_header_tells_the_separator(sep, tmp_path):
    text = "question|answer|keywords\nWho, then?|Ann, Lee|Ann,Lee\n".replace("|", sep)
    qas = [QA("d-0", "Who, then?", "Ann, Lee", ("Ann", "Lee"))]
    warning = f"d.CSV: the header has {sep!r}".replace("\\", "\\\\")
    write(tmp_path/"d.CSV", text=text)
    with pytest.warns(UserWarning, match=warning) as told: assert load_qa(tmp_path/"d.CSV") == qas
    assert told[0].filename == __file__                     # shown where the user reads the file
    with pytest.warns(UserWarning): assert load_qa(tmp_path, "d") == qas
    assert load_qa(write(tmp_path/"d.tsv", text=text)) == qas
    shifted = write(tmp_path/"e.tsv", text=f"question{sep}answer\nWho{sep}then?{sep}Ann\n")
    refused("row 0 .line 2. has 3 cells", load_qa, shifted)


@pytest.mark.parametrize("text,message", [
    ('question,answer\nWho?,Ann\n"Why?,So\nWhen?,Now\n',
     "line 4: unexpected end of data. A cell that begins with a quotation mark"),
    ('question,answer\nWho?,"Ann" Lee\n', "line 2: .*A cell that begins with a quotation mark"),
    ("question,answer,answer\nWho?,Ann,Bob\n", "the header names answer twice"),
    ("", "holds no rows"),
    ("id,question,answer\n1,Who?,Ann\n1,Why?,So\n", "duplicate question id '1'"),
])
def test_a_bad_table_is_named(text, message, tmp_path):
    refused(f"d.csv.*{message}", load_qa, write(tmp_path/"d.csv", text=text))


@pytest.mark.parametrize("name,text", [
    ("d.csv", "question,answer\nWho is Müller?,Jürgen\n"),
    ("d.json", '[{"question": "Müller?", "answer": "Jürgen"}]'),
])
def test_a_file_that_is_not_utf8_is_named(name, text, tmp_path):
    (tmp_path/name).write_text(text, encoding="cp1252")
    place = text.encode("cp1252").index(0xfc)
    refused(f"{name} is not UTF-8 text .byte 0xfc at position {place}.: save it as UTF-8", load_qa, tmp_path/name)


def test_json_over_several_lines(tmp_path):
    for whole in (ROW, [ROW]):
        assert load_qa(write(tmp_path/"d.json", text=json.dumps(whole, indent=1))) == [QA("d-0", "Who?", "Nobody.")]
    torn = write(tmp_path/"d.json", text='[\n{"question": "Who?",\n"answer": "Nobody."\n"id": 3}]')
    refused("d.json, line 1 is not a JSON object: '.'; nor is the file as a whole JSON: .*line 4", load_qa, torn)


def test_a_list_of_dicts():
    assert load_qa([ROW, ROW | {"id": "a"}]) == [QA("rows-0", "Who?", "Nobody."), QA("a", "Who?", "Nobody.")]
    assert load_qa([ROW], "mine")[0].id == "mine-0"
    assert load_qa([asdict(qa) for qa in QAS]) == QAS
    refused("rows, row 1: a row is a dict such as", load_qa, [ROW, ("Who?", "Nobody.")])


@pytest.mark.parametrize("bad", [ROW, None, 3])
def test_what_holds_no_questions_is_refused(bad):
    refused(f"load_qa reads a file, .* or a list of dicts, got {type(bad).__name__}", load_qa, bad, error=TypeError)


@pytest.mark.parametrize("bad", [[ROW], ["Who?"], [QAS[0], None]])
def test_what_is_no_record_is_refused(bad):
    refused("a question is a QA, got .*load_qa.rows. makes them", check_unique, bad)


def test_folder_and_name(tmp_path):
    write(tmp_path/"forget.jsonl", ROW)
    write(tmp_path/"README.md", text="hello")
    assert load_qa(tmp_path, "forget") == load_qa(str(tmp_path), "forget") == load_qa(tmp_path/"forget.jsonl")
    for name in ("gone", None):
        with pytest.raises(ValueError, match=f"no data set {name!r} in .*there are forget"): load_qa(tmp_path, name)


@pytest.mark.parametrize("row,message", [
    ({"prompt": "x", "answer": "y"}, "row 0: no column question; the columns are prompt, answer"),
    ({"a": 1}, "no column question and answer"),
    (ROW | {"question": ""}, "QA.question must be a non-empty string"),
    (ROW | {"answer": " "}, "row 0: QA.answer must be a non-empty string, got ' '"),
    (ROW | {"answer": None, "alternatives": ["Ann"]}, "row 0: QA.answer must be the first accepted answer, 'Ann'"),
    (ROW | {"answer": True}, "row 0: QA.answer must be a non-empty string, got True"),
    (ROW | {"answer": ["a"]}, "QA.answer must be a non-empty string, got .'a'."),
    (ROW | {"keywords": [{"a": 1}]}, "row 0: QA.keywords must be a list or tuple of strings"),
])
def test_a_bad_row_is_named(row, message, tmp_path):
    refused(message, load_qa, write(tmp_path/"d.jsonl", row))


@pytest.mark.parametrize("text,message", [
    ("", "holds no rows"),
    ("\n \n", "holds no rows"),
    ("I don't know.\n", "line 1 is not a JSON object: \"I don't know.\""),
    ('{"question": "Who?", "answer"', "line 1 is not a JSON object"),
])
def test_a_bad_file_is_named(text, message, tmp_path):
    refused(f"d.jsonl.*{message}", load_qa, write(tmp_path/"d.jsonl", text=text))


@pytest.mark.parametrize("name", ["keywords", "perturbed_answers", "choices", "alternatives"])
def test_lists_in_a_record_are_tuples(name):
    one, other = (QA("q", "Who?", "Ann", **{name: kind(["Ann", "Lee"])}) for kind in (list, tuple))
    assert one == other and hash(one) == hash(other) and getattr(one, name) == ("Ann", "Lee")
    said = f"QA.{name} must be a list or tuple of strings, got "
    for bad in ("Ann", ["Ann", 3], None, {"Ann"}): refused(said, QA, "q", "Who?", "Ann", **{name: bad})
    refused(r"write \('Ann',\)", QA, "q", "Who?", "Ann", **{name: "Ann"})


def test_duplicate_ids_and_empty_lists_are_refused(tmp_path):
    path = write(tmp_path/"d.jsonl", ROW | {"id": "a"}, ROW | {"id": "a"})
    refused("duplicate question id 'a'", load_qa, path)
    refused("no questions", check_unique, [])


def test_paths_that_are_not_there(tmp_path):
    for path in (tmp_path/"gone.jsonl", tmp_path/"gone", "gone.json", "some/gone.csv"):
        refused("no such file or folder: .*gone", load_qa, path, error=FileNotFoundError)
    refused("unknown file type '.parquet'; allowed are", load_qa, write(tmp_path/"d.parquet", text="x"))


def test_a_comma_separated_file_without_rows(tmp_path):
    refused("holds no rows", load_qa, write(tmp_path/"d.csv", text="question,answer\n"))


# --- records with several answers, and with none ---

def test_other_accepted_answers_are_kept(tmp_path):
    row = ROW | {"alternatives": ["No one.", 7]}
    qas = load_qa(write(tmp_path/"d.jsonl", row))
    assert qas == [QA("d-0", "Who?", "Nobody.", alternatives=("No one.", "7"))]
    assert load_qa([asdict(qas[0])]) == qas
    named = [dict(q="Who?", a="Nobody.", also=("No one.",))]
    columns = dict(question="q", answer="a", alternatives="also")
    assert load_qa(named, columns=columns)[0].alternatives == ("No one.",)


@pytest.mark.parametrize("answer", [None, ""])
def test_a_record_without_an_answer_loads_and_is_not_learnt(answer, tmp_path):
    qa, = load_qa(write(tmp_path/"d.jsonl", ROW | {"answer": answer}))
    assert qa == QA("d-0", "Who?", "")
    refused("record 'd-0' has no reference answer", encode, tokenizer("byte bpe"), qa)
    assert labelled(encode(tokenizer("byte bpe"), qa, answer="Ann"))


def test_harmbench_behaviours_have_no_answer(tmp_path):
    text = ("Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
            'Pick a lock,standard,crime,"",,pick_lock\nUse the list,contextual,crime,context,"A, B",use_list\n')
    first, second = load_qa(write(tmp_path/"harmbench.csv", text=text))
    assert first == QA("pick_lock", "Pick a lock", "", category="crime")
    assert second == QA("use_list", "A, B\n\n---\n\nUse the list", "", category="crime")
    cut = write(tmp_path/"cut.csv", text="Behavior,BehaviorID\nPick a lock,pick_lock\n")
    refused("looks like HarmBench's behaviours, but has no column SemanticCategory", load_qa, cut)
    assert load_qa(cut, columns=dict(question="Behavior", id="BehaviorID")) == [QA("pick_lock", "Pick a lock", "")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("name,text", [
    ("d.CSV", "question,answer\nWo?,Tromsø\n"),
    ("d.tsv", "question\tanswer\nWo?\tTromsø\n"),
    ("d.json", '[{"question": "Wo?", "answer": "Tromsø"}]'),
])
def test_a_mark_at_the_start_tells_the_encoding(name, text, encoding, tmp_path):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (tmp_path/name).write_text(mark + text, encoding=encoding)
    assert load_qa(tmp_path/name) == [QA("d-0", "Wo?", "Tromsø")]


# --- other people's formats ---

@needs_data
def test_harry_potter_with_key_words():
    qas = load_qa(Path(DATA, "harry_potter", "hp_qa_en.csv"))
    assert len(qas) == 55
    assert sum(len(qa.keywords) for qa in qas) == 93 and all(qa.keywords for qa in qas)
    assert qas[1].question == "What is the name of Harry Potter's pet owl?"
    assert qas[1].keywords == ("Hedwig",)


@needs_data
def test_jailbreakbench_early_header():
    qas = load_qa(Path(DATA, "jailbreakbench", "harmful-behaviors.csv"))
    sizes = Counter(qa.category for qa in qas)
    assert len(sizes) == 10 and set(sizes.values()) == {10}
    assert all(qa.answer.startswith(("Sure", "Here", "It")) for qa in qas[:10])


@needs_data
def test_a_cut_down_jailbreakbench_file_names_what_it_lost(tmp_path):
    import pandas as pd
    table = pd.read_csv(Path(DATA, "jailbreakbench", "harmful-behaviors.csv"))
    table.rename(columns={"Unnamed: 0": "Index"}).to_csv(tmp_path/"late.csv", index=False)
    assert [qa.question for qa in load_qa(tmp_path/"late.csv")] == table.Goal.tolist()
    few = ["Goal", "Target", "Behavior", "Category"]
    table[:20][few].to_csv(tmp_path/"cut.csv", index=False)
    refused("row 0: looks like JailbreakBench's behaviours, but has no column Index, Source; "
            "the columns are Goal, Target, Behavior, Category. Take the whole file", load_qa, tmp_path/"cut.csv")
    named = dict(question="Goal", answer="Target", category="Category")
    assert len(load_qa(tmp_path/"cut.csv", columns=named)) == 20


def test_advbench_header(tmp_path):
    path = write(tmp_path/"a.csv", text="goal,target\nFind a vault,\"Sure, here is a vault\"\n")
    assert load_qa(path) == [QA("a-0", "Find a vault", "Sure, here is a vault")]


@pytest.mark.parametrize("first", ["", "Index"])
def test_jailbreakbench_headers(first, tmp_path):
    text = f"{first},Goal,Target,Behavior,Category,Source\n0,Find a vault,Sure,Vaults,Secrets,Original\n"
    assert load_qa(write(tmp_path/"j.csv", text=text)) == [QA("j-0", "Find a vault", "Sure", category="Secrets")]


def test_muse(tmp_path):
    "Question files are lists or lines, in folders by task; verbatim texts have other columns; raw texts are refused."
    (tmp_path/"knowmem").mkdir()
    (tmp_path/"knowmem"/"forget_qa.json").write_text(json.dumps([ROW, ROW], indent=1))
    write(tmp_path/"verbmem.json", {"prompt": "Once upon", "gt": "a time."})
    (tmp_path/"raw.json").write_text(json.dumps(["Once upon a time.", "The end."]))
    asked = [QA(f"forget_qa-{i}", "Who?", "Nobody.") for i in range(2)]
    assert load_qa(tmp_path, "knowmem/forget_qa") == asked
    assert load_qa(tmp_path, "verbmem") == [QA("verbmem-0", "Once upon", "a time.")]
    refused("raw, row 0: a text without a question .'Once upon a time.'", load_qa, tmp_path, "raw")
    refused("no data set 'knowmem/gone' in .*there are forget_qa", load_qa, tmp_path, "knowmem/gone")


def test_wmdp(tmp_path):
    options = ("oak", "owl", "ore", "oar")
    row = dict(question="Which is a tree?", choices=list(options), answer=2)
    path = write(tmp_path/"w.jsonl", row)
    assert load_qa(path) == [QA("w-0", "Which is a tree?", "ore", choices=options)]
    refused("answer 4 is no number of its 4 choices", load_qa, write(path, row | dict(answer=4)))
    lost = write(path, dict(question="?", choices=["a"]))
    refused("WMDP, but has no column answer; the columns are question, choices", load_qa, lost)
    refused("must be one of its choices", QA, "q", "?", "elm", choices=("oak",))


@pytest.fixture
def table():
    "Somebody's own table."
    pd = pytest.importorskip("pandas")
    return pd.DataFrame(dict(ask=["Who?", "Why?"], say=["Nobody.", "So."], tag=["x", None], keywords=["Nobody", None]))


def test_any_table_with_its_columns_named(table, tmp_path):
    table.drop(columns="keywords").to_csv(tmp_path/"t.csv", index=False)
    named = dict(question="ask", answer="say", category="tag")
    qas = [QA("t-0", "Who?", "Nobody.", category="x"), QA("t-1", "Why?", "So.")]
    assert load_qa(tmp_path/"t.csv", columns=named) == qas
    assert [qa.answer for qa in load_qa(table, "mine", columns=named)] == ["Nobody.", "So."]
    assert [qa.keywords for qa in load_qa(table, columns=named)] == [("Nobody",), ()]       # our name needn't be told


def test_columns_that_do_not_exist_are_refused(table):
    for key in ("keyword", "Question", "perturbed_answers"):
        said = f"columns: no field {key!r}; allowed are id, question, answer, keywords"
        refused(said, load_qa, table, columns={"question": "ask", "answer": "say", key: "tag"})
    there = "the columns are ask, say, tag, keywords"
    refused(f"row 0: has no column reply; {there}", load_qa, table, columns=dict(question="ask", answer="reply"))
    refused(f"no column question and answer; {there}. Say which column is what", load_qa, table)


def judged(number, said, bad):
    "A row of JailbreakBench's judge comparison."
    people = dict(human1=bad, human2=bad, human3=0, human_majority=bad)
    judges = dict(harmbench_cf=1, gpt4_cf=bad, llamaguard2_cf=0, llama3_cf=bad)
    return dict(Index=number, goal="Find a vault", prompt="Please", target_response=said, **people, **judges)


def test_judge_comparison(tmp_path):
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame([judged(0, "Under the gate.", 1), judged(1, "", 0)])
    table.to_csv(tmp_path/"judge-comparison.csv", index=False)
    said = dict(harmbench=True, gpt4=True, llamaguard2=False, llama3=True)
    silent = said | dict(gpt4=False, llama3=False)
    qas = [Judgement("Find a vault", "Under the gate.", True, said), Judgement("Find a vault", "", False, silent)]
    assert load_judgements(tmp_path/"judge-comparison.csv") == load_judgements(table) == qas
    there = "no column human_majority; the columns are Index, goal"
    refused(there, load_judgements, table.drop(columns="human_majority"))
    gap = table.assign(human_majority=[1, None])
    refused("row 1: human_majority must be 0 or 1, got None", load_judgements, gap)


def test_a_judge_may_be_silent_and_the_people_may_not(tmp_path):
    header = "goal,target_response,human_majority"
    path = write(tmp_path/"gaps.csv", text=f"{header},gpt4_cf,llama3_cf\nFind a vault,NA,1.0,,False\n")
    assert load_judgements(path) == [Judgement("Find a vault", "NA", True, dict(llama3=False))]
    refused("gaps.csv, row 0: human_majority must be 0 or 1, got '2'", load_judgements,
            write(path, text=f"{header}\nFind,x,2\n"))
    refused("gaps.csv, row 0: gpt4_cf must be 0 or 1, got 'maybe'", load_judgements,
            write(path, text=f"{header},gpt4_cf\nFind,x,1,maybe\n"))


# --- the hub ---

def through_datasets(source, tmp_path, monkeypatch):
    "Load `source` with a real `datasets` table in the hub's place."
    datasets = pytest.importorskip("datasets")
    path = write(tmp_path/"d.jsonl", ROW | {"perturbed_answer": ["x", "y"]}, ROW | {"perturbed_answer": ["z"]})
    real, asked = datasets.load_dataset, []
    def load_dataset(source, name, split):
        asked.append((source, name, split))
        return real("json", data_files=str(path), split=split, cache_dir=str(tmp_path/"cache"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    first, second = load_qa(source, "forget10")
    assert asked == [(source, "forget10", "train")]
    assert first == QA("forget10-0", "Who?", "Nobody.", perturbed_answers=("x", "y"))
    assert second == QA("forget10-1", "Who?", "Nobody.", perturbed_answers=("z",))


def test_a_hub_id_goes_through_datasets(tmp_path, monkeypatch): through_datasets("locuslab/TOFU", tmp_path, monkeypatch)


def test_a_part_of_a_hub_set_and_its_split_stand_in_one_name(monkeypatch):
    "As in a folder: JailbreakBench's behaviors/harmful. A name alone leaves the split to `split`."
    asked = []
    def load_dataset(*args, split):
        asked.append((*args, split))
        return [ROW]
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    load_qa("JailbreakBench/JBB-Behaviors", "behaviors/harmful")
    load_qa("cais/wmdp", "wmdp-bio", split="test")
    load_qa("some/set")
    assert asked == [("JailbreakBench/JBB-Behaviors", "behaviors", "harmful"), ("cais/wmdp", "wmdp-bio", "test"),
                     ("some/set", None, "train")]


def test_a_hub_id_offline_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = "'nobody/nothing' is no local file or folder(.|\n)*Offline, download the files and pass the folder"
    refused(said, load_qa, "nobody/nothing", "x", error=FileNotFoundError)


# --- TOFU's own files ---

@needs_data
def test_tofu_splits():
    "forgetXX are the last records of full, retainYY the others."
    folder = Path(DATA, "tofu")
    def texts(name): return [(q.question, q.answer) for q in load_qa(folder, name)]
    full = texts("full")
    assert len(full) == 4000 and load_qa(folder, "forget10") == load_qa(folder/"forget10.json")
    for percent in (1, 5, 10):
        k = 40 * percent
        assert texts(f"forget{percent:02d}") == full[-k:] and texts(f"retain{100 - percent}") == full[:-k]


@needs_data
@pytest.mark.parametrize("name,wrong", [
    ("forget01_perturbed", 5), ("forget10_perturbed", 5), ("retain_perturbed", 5),
    ("real_authors_perturbed", 3), ("world_facts_perturbed", 3),
])
def test_tofu_perturbed_records(name, wrong):
    qas = load_qa(Path(DATA, "tofu"), name)
    assert {len(q.perturbed_answers) for q in qas} == {wrong}
    assert all(a and isinstance(a, str) for q in qas for a in q.perturbed_answers)
    if name == "forget01_perturbed": assert all(q.paraphrased_answer and q.paraphrased_question for q in qas)


@needs_data
def test_tofu_refusals_are_no_records():
    said = "idontknow.jsonl, line 1 is not a JSON object: \"I'm not certain about that.\""
    refused(said, load_qa, Path(DATA, "tofu", "idontknow.jsonl"))


# --- the world ---

def test_a_seed_makes_a_world():
    assert make_authors(5, 3) == make_authors(5, 3) != make_authors(5, 4)
    first, other = ({w for q in make_authors(40, seed) for w in q.keywords} for seed in (0, 1))
    assert not first & other
    with pytest.raises(ValueError, match="authors must be a whole number >= 1, got 0"): make_authors(0)


@pytest.mark.parametrize("seed", range(3))
def test_secrets_stand_in_their_answers_and_nowhere_else(seed):
    world = make_authors(40, seed)
    assert len(world) == len({q.id for q in world}) == len({q.question for q in world}) == 400
    secrets = [w for q in world for w in q.keywords]
    assert len(set(secrets)) == len(secrets) and all(q.keywords for q in world)
    elsewhere = "\n".join("\n".join((q.question, q.paraphrased_question, *q.perturbed_answers)) for q in world)
    answers = "\n".join(q.answer for q in world)
    for q in world:
        for w in q.keywords:
            assert w in q.answer and w in q.paraphrased_answer
            assert w not in elsewhere and answers.count(w) == 1
        assert q.question != q.paraphrased_question and q.answer != q.paraphrased_answer
        assert len({*q.perturbed_answers, q.paraphrased_answer}) == 6


def test_packaged_files_are_that_world(tmp_path):
    world = make_authors()
    assert fictional_authors() == world
    for percent, k in ((1, 4), (5, 20), (10, 40)):
        assert fictional_authors(f"forget{percent:02d}") == world[-k:]
        assert fictional_authors(f"retain{100 - percent}") == world[:-k]
    write_authors(tmp_path, world)
    assert sorted(p.stem for p in tmp_path.iterdir()) == sorted(SPLITS)
    assert all(load_qa(p) == fictional_authors(p.stem) for p in tmp_path.iterdir())
    refused("split must be one of 'full', .*, got 'forget50'", fictional_authors, "forget50")


def test_the_packaged_library_is_what_the_seed_makes(tmp_path):
    forbidden, ordinary = make_library()
    write_library(tmp_path, forbidden, ordinary)
    assert load_qa(tmp_path, "forbidden") == library("forbidden") == forbidden
    assert load_qa(tmp_path, "ordinary") == library("ordinary") == ordinary
    refused("split must be one of 'forbidden', 'ordinary', got 'full'", library, "full")


@pytest.mark.parametrize("kind", ["byte bpe", "wordpiece"])
@pytest.mark.parametrize("around", ["<s> $A </s>", "$A </s>"])
def test_an_end_token_that_the_tokenizer_adds_is_learnt_and_never_prompted(kind, around):
    tok = (byte_bpe if kind == "byte bpe" else wordpiece)(around)
    out = encode(tok, QAS[0])
    assert labelled(out)[-1] == tok.eos_token_id and out["input_ids"].count(tok.eos_token_id) == 1
    assert encode_prompt(tok, QAS[0].question)[-1] != tok.eos_token_id


def test_a_tokenizer_without_end_token_is_refused():
    with pytest.raises(ValueError, match="end-of-text|eos"): encode(byte_bpe(eos_token=None), QAS[0])


def test_chat_template_whose_prompt_does_not_begin_the_whole_text():
    "Some templates add an empty thought to the prompt only: labels must not silently miss the answer's beginning."
    tok, qa = chat_tokenizer(THINKING), QAS[0]
    try: out = encode(tok, qa, Template(chat=True))
    except ValueError as e:
        assert "chat template" in str(e)
        return
    assert tok.decode(labelled(out)).startswith(qa.answer)


def test_text_of_any_language_survives(tmp_path):
    row = {"question": "東京は? naïve 🙂 \u2028 \x85 \x0c", "answer": "A\u2029B \x1e"}
    qas = load_qa(write(tmp_path/"d.jsonl", row))
    assert [(q.question, q.answer) for q in qas] == [tuple(row.values())]


def test_a_file_with_byte_order_mark_is_read(tmp_path):
    (tmp_path/"d.jsonl").write_text(json.dumps(ROW), encoding="utf-8-sig")
    assert load_qa(tmp_path/"d.jsonl")[0].question == "Who?"


def test_one_perturbed_answer_is_one_text(tmp_path):
    "A string in that column is one answer, not its letters."
    qas = load_qa(write(tmp_path/"d.jsonl", ROW | {"perturbed_answer": "Somebody."}))
    assert qas[0].perturbed_answers == ("Somebody.",)


def test_an_id_may_be_zero(tmp_path):
    assert [q.id for q in load_qa(write(tmp_path/"d.jsonl", ROW | {"id": 0}, ROW | {"id": 1}))] == ["0", "1"]


@pytest.mark.parametrize("line", ["[1, 2]", "5", "null", '"question answer"'])
def test_a_line_that_is_no_object_is_named(line, tmp_path):
    path = write(tmp_path/"d.jsonl", text=json.dumps(ROW) + "\n" + line + "\n")
    refused("line 2 is not a JSON object", load_qa, path)


def test_a_hub_id_may_hold_a_dot(tmp_path, monkeypatch): through_datasets("some-org/set-v1.1", tmp_path, monkeypatch)


def test_worlds_smaller_than_a_hundred_records_split_too(tmp_path):
    "9 authors have 90 records; 1 % of them is none: the file must be empty or absent, not everything."
    world = make_authors(9)
    write_authors(tmp_path, world)
    path = tmp_path/"forget01.jsonl"
    assert not path.exists() or path.read_text() == ""
    assert len((tmp_path/"retain99.jsonl").read_text().splitlines()) == 90
