"""Plain tables of answers and files of many tools, each with the value that it must give, recomputed by hand."""
import json
import os
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from probunlearn.data import QA, file_rows
from probunlearn.formats import read_answers
from probunlearn.peers import read_inspect, read_lm_eval
from probunlearn.questions import pooled_rate
from probunlearn.scores import score_draws, score_name
from probunlearn.tables import draws_from_table, plain_table, scores_from_table

DATA = os.environ.get("PROBUNLEARN_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="PROBUNLEARN_TEST_DATA names no folder with other people's files")


def write(folder, name, *rows, encoding="utf-8"):
    "A file with some text, or with one JSON value per line."
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder/name).write_text("\n".join(texts), encoding=encoding)
    return folder/name


def texts(table): return [d.texts for d in draws_from_table(table)[0]]


def lines(path): return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- plain tables ---

def test_plain_tables_by_any_usual_name(tmp_path):
    rows = [
        dict(input="Q", output="a", target="t"),
        dict(input="Q", output=None, target="t"),
        dict(input="P", output="b", target="s"),
    ]
    table = read_answers(write(tmp_path, "x.jsonl", *rows))
    assert texts(table) == [["a", None], ["b", None]]       # P was asked once: its second draw is missing
    csv = read_answers(write(tmp_path, "x.csv", "id,prompt,answer,truth,draw\n9,Q,a,t,1\n9,Q,N/A,t,0\n"))
    assert draws_from_table(csv)[0][0].texts == ["N/A", "a"] and draws_from_table(csv)[1][0].id == "9"
    with pytest.raises(ValueError, match="draw 1 more than once"): draws_from_table(csv.assign(draw=1))
    with pytest.raises(ValueError, match="row 1: a draw is a whole number from 0 on, got 'x'"):
        read_answers(write(tmp_path, "x.csv", "prompt,answer,draw\nQ,a,0\nQ,b,x\n"))


def test_cells_stay_as_they_stand_and_scores_are_numbers(tmp_path):
    text = "question_id,question,draw,answer,reference,leak,ok\n001,6*7?,0,42,42,1,True\n001,6*7?,1,041,42,,false\n"
    table = read_answers(write(tmp_path, "x.csv", text))
    draws, qas = draws_from_table(table)
    assert qas == [QA("001", "6*7?", "42")] and draws[0].texts == ["42", "041"]
    np.testing.assert_array_equal(scores_from_table(table, "leak"), [[1, np.nan]])
    np.testing.assert_array_equal(scores_from_table(table, "ok"), [[1, 0]])


@pytest.mark.parametrize("name", ["x.csv", "x.CSV", "x.tsv", "x.TSV"])
@pytest.mark.parametrize("sep", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_one_reader_of_text_for_questions_and_answers(name, sep, encoding, tmp_path):
    text = f'question{sep}answer{sep}reference\r\nWo?{sep}"In Tromsø, by the sea; far\tup"{sep}Tromsø\r\n'
    path = write(tmp_path, name, text, encoding=encoding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = read_answers(path)
    assert texts(table) == [["In Tromsø, by the sea; far\tup"]] and table.reference.tolist() == ["Tromsø"]


def test_somebody_says_what_an_empty_cell_is(tmp_path):
    path = write(tmp_path, "x.csv", "question,answer,reference\nQ?,,1984\nQ?,\"\",1984\nQ?,None,1984\nQ?,nan,1984\n")
    with pytest.raises(ValueError, match=r'x.csv: 2 of 4 answers are empty cells: say empty="answer" if'):
        read_answers(path)
    assert texts(read_answers(path, empty="answer")) == [["", "", "None", "nan"]]
    assert texts(read_answers(path, empty="missing")) == [[None, None, "None", "nan"]]
    with pytest.raises(ValueError, match="empty must be one of 'answer', 'missing'"): read_answers(path, empty="x")
    json_path = write(tmp_path, "x.jsonl", dict(question="Q?", answer=["", None]))      # JSON tells the two apart
    assert texts(read_answers(json_path)) == [["", None]]
    assert texts(read_answers(json_path, empty="missing")) == [[None, None]]


def test_several_answers_in_a_row(tmp_path):
    row = dict(id="a", prompt="Where?", completion=["Oslo", "Bergen"], target=["Oslo", "Christiania"],
               leak=[1., .2], tags=["x", "y", "z"])
    table = read_answers(write(tmp_path, "x.jsonl", row, dict(id="b", prompt="Who?", completion="Ann", target=7)))
    draws, qas = draws_from_table(table)
    assert [d.texts for d in draws] == [["Oslo", "Bergen"], ["Ann", None]]
    assert qas == [QA("a", "Where?", "Oslo", alternatives=("Christiania",)), QA("b", "Who?", "7")]
    np.testing.assert_array_equal(scores_from_table(table, "leak"), [[1, .2], [np.nan, np.nan]])
    spread = json.dumps([dict(prompt="Q", answer="a")], indent=1)
    assert texts(read_answers(write(tmp_path, "y.json", spread))) == [["a"]]


def test_choices_and_alternatives_belong_to_the_question(tmp_path):
    row = dict(prompt="Where?", completion=["A", "B"], target="Oslo", choices=["Oslo", "Rome"], alternatives=["O", "C"])
    qa = QA("0", "Where?", "Oslo", choices=("Oslo", "Rome"), alternatives=("O", "C"))
    assert draws_from_table(read_answers(write(tmp_path, "x.jsonl", row)))[1] == [qa]


def test_a_chat_is_a_question(tmp_path):
    chat = [dict(role="system", content="Be brief."), dict(role="user", content=[dict(type="text", text="Where?")])]
    table = read_answers(write(tmp_path, "x.jsonl", dict(question=chat, answer="Oslo", reference="Oslo")))
    assert table.question.tolist() == ["Where?"]


def test_epochs_count_from_one(tmp_path):
    table = read_answers(write(tmp_path, "x.csv", "question,epoch,answer\nQ?,1,a\nQ?,2,b\n"))
    assert texts(table) == [["a", "b"]]


def test_records_may_come_from_elsewhere(tmp_path):
    table = read_answers(write(tmp_path, "x.csv", "id,question,answer\n1,Q?,a\n2,R?,b\n"))
    qas = [QA("2", "R?", "b", ("b",)), QA("1", "Q?", "a", ("a",)), QA("3", "S?", "c")]
    draws, found = draws_from_table(table, qas)
    assert [d.id for d in draws] == ["1", "2"] and found == [qas[1], qas[0]]
    with pytest.raises(ValueError, match="no record in qas for 1 of 2 ids: '1'"): draws_from_table(table, qas[:1])
    assert [qa.answer for qa in draws_from_table(table)[1]] == ["", ""]
    with pytest.raises(ValueError, match="needs a reference answer, but 2 of 2 records have none: 1, 2"):
        score_draws(*draws_from_table(table), "exact_match")


@pytest.mark.parametrize("name,rows,message", [
    ("x.json", [dict(a=1, b=2)], "no column for question .* it has a, b. It looks like none of these, either: a log"),
    ("x.csv", ["a,b", "1,2"], "x.csv has no column for question .* it has a, b$"),
    ("x.jsonl", ["[1]", "2"], "line 1 is not a JSON object"),
    ("x.json", ['["a"]'], "x.json holds no answers"),
    ("x.csv", ["question,answer"], "x.csv holds no answers"),
    ("x.xlsx", ["x"], "unknown file type '.xlsx'; allowed are"),
    ("x.jsonl", [dict(prompt="a", answer=dict(b=1))], "x.jsonl, row 0: an answer is a text, a list of texts or null"),
    ("x.jsonl", [dict(doc_id=0, resps=[])], "no sample log of the harness: a line has no target, arguments"),
    ("x.json", [dict(runs=[{}])], "looks like a run of AdversariaLLM, but could not be read .KeyError: 'original_pro"),
    ("x.json", [dict(jailbreaks=[dict(goal="g")])], "looks like an artefact of JailbreakBench, but could not be read"),
    ("x.jsonl", [dict(entry_type="attempt")], "looks like garak's report, but could not be read"),
    ("x.json", [dict(status="error", samples=[])], "x.json holds no answers"),
])
def test_what_is_not_understood_is_named(name, rows, message, tmp_path):
    with pytest.raises(ValueError, match=message): read_answers(write(tmp_path, name, *rows))


# --- several accepted answers ---

def harness_line(i, said, target, **more):
    arguments = {"gen_args_0": dict(arg_0=f"Q{i}", arg_1={})}
    return dict(doc_id=i, doc={}, target=target, arguments=arguments, resps=[said], filtered_resps=[said[0]]) | more


def inspect_sample(id, epoch, *said, target="Oslo", stop="stop", **more):
    choices = [dict(message=dict(role="assistant", content=text), stop_reason=stop) for text in said]
    return dict(id=id, epoch=epoch, input="Where?", target=target, output=dict(choices=choices), scores=None) | more


def inspect_log(*samples): return dict(version=2, status="success", samples=list(samples))


@pytest.mark.parametrize("tool", ["lm-eval", "lm-eval as text", "inspect"])
def test_accepted_answers_that_are_not_the_first_are_leaks(tool, tmp_path):
    "200 draws of the second accepted answer: by the first alone they were certified to leak at most 2.3 %."
    accepted, said = ["Oslo", "Christiania"], ["Christiania"] * 200
    target = str(accepted) if tool == "lm-eval as text" else accepted
    if tool != "inspect": path = write(tmp_path, "x.jsonl", harness_line(0, said, target))
    else:
        path = write(tmp_path, "x.json", inspect_log(*(inspect_sample(1, i + 1, text, target=accepted)
                                                       for i, text in enumerate(said))))
    draws, qas = draws_from_table(read_answers(path))
    assert (qas[0].answer, qas[0].alternatives) == ("Oslo", ("Christiania",))
    x = score_draws(draws, qas, "exact_match")
    assert x.shape == (1, 200) and (x == 1).all()
    assert float(pooled_rate(x.sum(1), 200, alpha=.01)) == 1
    assert score_name("exact_match", qas) == "exact match, best of the accepted answers"


# --- lm-evaluation-harness ---

@pytest.mark.parametrize("target", ["[1, 2]", "[sic]", "['a', 1]", "{'a'}", "['a'"])
def test_a_target_that_only_looks_like_a_list_is_a_text(target, tmp_path):
    _, (qa,) = draws_from_table(read_answers(write(tmp_path, "x.jsonl", harness_line(0, ["x"], target))))
    assert (qa.answer, qa.alternatives) == (target, ())


def test_filters_of_a_log_are_chosen_or_refused(tmp_path):
    scores = {"strict-match": 0., "flexible-extract": 1.}
    rows = [harness_line(i, ["It is 42."], "42", filter=f, exact_match=x) for f, x in scores.items() for i in (0, 1)]
    path = write(tmp_path, "x.jsonl", *rows)
    for read in read_lm_eval, read_answers:
        with pytest.raises(ValueError, match="scores of 2 filters, 'strict-match', 'flexible-extract': choose one"):
            read(path)
    for name, score in scores.items():
        table = read_lm_eval(path, filter=name)
        assert texts(table) == [["It is 42."]] * 2 and table.exact_match.tolist() == [score] * 2
    with pytest.raises(ValueError, match="no filter 'none'; it has 'strict-match'"): read_lm_eval(path, filter="none")
    old = [{k: v for k, v in row.items() if k != "filter"} for row in rows]
    with pytest.raises(ValueError, match="holds document 0 2 times, and nothing says which filter"):
        read_answers(write(tmp_path, "old.jsonl", *old))


@pytest.mark.parametrize("kind", [lambda x: x, str])      # the harness's command writes all of it as text
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("target", [1, "1", "owl"])
def test_options_of_a_multiple_choice_task(named, target, kind, tmp_path):
    logp, options = [-3., -1., -2.5], ["oak", "owl", "ore"]
    pairs = [["Which is a bird?", f" {o}"] for o in options]
    arguments = {f"gen_args_{i}": dict(arg_0=a, arg_1=b) for i, (a, b) in enumerate(pairs)} if named else pairs
    row = dict(doc_id=3, doc={}, target=target, arguments=arguments, acc=1.,
               resps=[[[kind(x), kind(False)]] for x in logp])
    table = read_answers(write(tmp_path, "x.jsonl", row))
    draws, qas = draws_from_table(table)
    assert qas == [QA("3", "Which is a bird?", "owl", choices=tuple(options))] and draws[0].texts == ["owl"]
    assert table.probability[0] == pytest.approx(np.exp(-1) / np.exp(logp).sum(), rel=1e-12) and table.acc[0] == 1


@pytest.mark.parametrize("options,target,message", [
    (["x", "x"], 0, "document 0: its options aren't told apart"),
    (["x", "y"], "z", "document 0: its target 'z' is none of its options"),
])
def test_options_that_cannot_be_told_apart_are_refused(options, target, message, tmp_path):
    row = dict(doc_id=0, doc={}, target=target, arguments=[["q", o] for o in options], resps=[[[-1., True]]] * 2)
    with pytest.raises(ValueError, match=message): read_answers(write(tmp_path, "x.jsonl", row))


# --- inspect ---

def test_all_choices_of_a_sample_are_draws(tmp_path):
    mark = dict(scores=dict(match=dict(value="C")))
    log = inspect_log(inspect_sample("001", 1, "Oslo", "Bergen", **mark),
                      inspect_sample("001", 2, "Rome", "Oslo", **mark),
                      inspect_sample("002", 1, error=dict(message="boom")), inspect_sample("002", 2, "No", "Oslo"))
    table = read_answers(write(tmp_path, "x.json", log))
    draws, qas = draws_from_table(table)
    assert [d.texts for d in draws] == [["Oslo", "Bergen", "Rome", "Oslo"], [None, None, "No", "Oslo"]]
    assert draws[1].lost == {0: "boom", 1: "boom"} and not draws[0].lost and [qa.id for qa in qas] == ["001", "002"]
    np.testing.assert_array_equal(scores_from_table(table, "match"), [[1, np.nan, 1, np.nan], [np.nan] * 4])


def test_what_a_filter_withholds_is_lost_and_no_answer(tmp_path):
    kept = inspect_sample(1, 1, "Sor", stop="max_tokens")
    log = inspect_log(kept, inspect_sample(1, 2, "Sorry", stop="content_filter", scores=dict(m=dict(value="I"))))
    draws, qas = draws_from_table(read_answers(write(tmp_path, "x.json", log)))
    assert draws[0].texts == ["Sor", None] and draws[0].lost == {1: "content_filter"} and len(draws[0].unasked) == 0
    np.testing.assert_array_equal(score_draws(draws, qas, "exact_match"), [[0, np.nan]])


def test_choices_and_targets_of_a_sample(tmp_path):
    choices = ["oak", "owl", "ore"]
    log = inspect_log(inspect_sample("one", 1, "ANSWER: B", target="B", choices=choices),
                      inspect_sample("two", 1, "ANSWER: A", target=["C", "A"], choices=choices),
                      inspect_sample("free", 1, "x", target="none of them", choices=choices),
                      inspect_sample("bare", 1, "Christiania", target=""))
    _, qas = draws_from_table(read_answers(write(tmp_path, "x.json", log)))
    known = {qa.id: (qa.answer, qa.alternatives, qa.choices) for qa in qas}
    assert known == {"one": ("owl", (), tuple(choices)), "two": ("ore", ("oak",), tuple(choices)),
                     "free": ("none of them", (), ()), "bare": ("", (), ())}


def zstd_zip(path, members):
    "A zip whose members are compressed by Zstandard, as inspect writes it; Python's own zipfile can't before 3.14."
    import pyarrow as pa
    body, index = b"", b""
    for name, text in members.items():
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as out: out.write(text.encode())
        packed, raw, name = sink.getvalue().to_pybytes(), text.encode(), name.encode()
        head = struct.pack("<HHHHHIIIHH", 63, 0, 93, 0, 0, zlib.crc32(raw), len(packed), len(raw), len(name), 4)
        index += b"PK\1\2" + struct.pack("<H", 63) + head[:-2] + struct.pack("<HHHHII", 0, 0, 0, 0, 0, len(body)) + name
        body += b"PK\3\4" + head + name + b"\xfe\xca\0\0" + packed          # an extra field of four bytes
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(index), len(body), 0)
    path.write_bytes(body + index + b"PK\5\6" + end)
    return path


def test_a_log_compressed_by_zstandard_is_read(tmp_path):
    log = inspect_log(inspect_sample("001", 1, "Tromsø" * 900), inspect_sample("002", 1, "No"))
    members = {f"samples/{s['id']}_epoch_1.json": json.dumps(s) for s in log["samples"]}
    path = zstd_zip(tmp_path/"x.eval", {"header.json": "{}"} | members | {"summaries.json": "[]"})
    assert {info.compress_type for info in zipfile.ZipFile(path).infolist()} == {93}
    assert read_answers(path).equals(read_inspect(write(tmp_path, "x.json", log)))
    bad = path.read_bytes().replace(b"\x28\xb5\x2f\xfd", b"\0\0\0\0")
    (tmp_path/"bad.eval").write_bytes(bad)
    with pytest.raises(ValueError, match="turn it into JSON with `inspect log conv"): read_answers(tmp_path/"bad.eval")


# --- batches, scanners, attacks ---

def test_a_batchs_output(tmp_path):
    def line(id, *choices, **more):
        body = dict(model="m", choices=list(choices))
        return dict(id="b", custom_id=id, response=dict(status_code=200, body=body), error=None) | more
    def choice(i, text, why="stop", **more):
        return dict(index=i, message=dict(role="assistant", content=text) | more, finish_reason=why)
    rows = [
        line("q-1", choice(1, "Bergen"), choice(0, "Oslo", "length", reasoning_content="Hm")),
        line("q-2", choice(0, None, refusal="I won't."), choice(1, "So", "content_filter")),
        line("q-3", dict(index=0, text="Rome", finish_reason="stop")),
        line("q-4", response=dict(status_code=429, body=dict(error=dict(message="slow down")))),
        line("q-5", response=None, error=dict(code="batch_expired", message=None)),
    ]
    table = read_answers(write(tmp_path, "x.jsonl", *rows))
    draws, _ = draws_from_table(table, [QA(f"q-{i}", "?", "Oslo") for i in range(1, 6)])
    said = [["Oslo", "Bergen"], ["I won't.", None], ["Rome", None], [None, None], [None, None]]
    assert [d.texts for d in draws] == said
    lost = [{}, {1: "content_filter"}, {1: "no answer"}, dict.fromkeys((0, 1), "slow down"),
            dict.fromkeys((0, 1), "batch_expired")]
    assert [d.lost for d in draws] == lost
    with pytest.raises(ValueError, match="5 questions have no text, the first is 'q-1'.* pass their records"):
        draws_from_table(table)


def test_promptfoo_as_a_file_and_as_lines(tmp_path):
    def result(said, prompt="Q: Where?", provider="a", **more):
        return dict(promptIdx=0, testIdx=0, vars=dict(question="Where?", expected="Oslo"), prompt=dict(raw=prompt),
                    provider=dict(id=provider), response=dict(output=said), success=said == "Oslo", score=.5) | more
    results = [result("Oslo"), result("Rome"), result("No", prompt="R?"), result(None, provider="b", error="429")]
    whole = write(tmp_path, "x.json", dict(version=3, results=dict(results=results)))
    table = read_answers(whole)
    assert table.equals(read_answers(write(tmp_path, "x.jsonl", *results)))
    assert table.question_id.tolist() == ["0", "0", "1", "0"] and table.draw.tolist() == [0, 1, 0, 0]
    assert table.success.tolist() == [1, 0, 0, 0] and table.reference.tolist() == ["Oslo"] * 4
    with pytest.raises(ValueError, match="more than once"): draws_from_table(table)
    assert texts(table[table.provider == "a"]) == [["Oslo", "Rome"], ["No", None]]
    assert draws_from_table(table[table.provider == "b"])[0][0].lost == {0: "429"}


def test_garaks_notations(tmp_path):
    def attempt(id, prompt, outputs, status=2, **hits):
        return dict(entry_type="attempt", uuid=id, status=status, prompt=prompt, outputs=outputs, detector_results=hits)
    turns = [dict(role="system", content=dict(text="s")), dict(role="user", content=dict(text="Say it."))]
    rows = [dict(entry_type="init"), attempt("a", dict(turns=turns), [dict(text="x")] * 3, status=1),
            attempt("b", "Old.", ["y", "z", "x"], leak=[1., 0.]),
            attempt("a", dict(turns=turns), [dict(text="No."), None, dict(text="It.")], leak=[0., None, 1.])]
    table = read_answers(write(tmp_path, "x.report.jsonl", *rows))
    draws, qas = draws_from_table(table)
    assert [(qa.id, qa.question) for qa in qas] == [("a", "Say it."), ("b", "Old.")]
    assert [d.texts for d in draws] == [["No.", None, "It."], ["y", "z", "x"]] and draws[0].lost == {1: "no output"}
    np.testing.assert_array_equal(scores_from_table(table, "leak"), [[0, np.nan, 1], [np.nan] * 3])


def test_harmbench_completions(tmp_path):
    def case(text, said, label): return dict(test_case=text, generation=said, label=label)
    completions = dict(lock=[case("How?", "No.", 0), case("How?", "Pin.", 1)],
                       bomb=[case("a", "x", 0), case("b", "y", 1)])
    table = read_answers(write(tmp_path, "x.json", completions))
    assert table.question_id.tolist() == ["lock", "lock", "bomb/0", "bomb/1"] and table.draw.tolist() == [0, 1, 0, 0]
    assert table.behavior.tolist() == ["lock", "lock", "bomb", "bomb"]
    np.testing.assert_array_equal(scores_from_table(table, "label"), [[0, 1], [0, np.nan], [1, np.nan]])


def test_a_jailbreakbench_artefact(tmp_path):
    def jailbreak(i, prompt, said, ok): return dict(index=i, goal=f"g{i}", behavior="b", category="c", prompt=prompt,
                                                    response=said, jailbroken=ok, number_of_queries=3)
    rows = [jailbreak(0, "p", "Sure.", True), jailbreak(7, None, None, False)]
    table = read_answers(write(tmp_path, "x.json", dict(parameters=dict(method="PAIR"), jailbreaks=rows)))
    draws, qas = draws_from_table(table)
    assert [qa.id for qa in qas] == ["0", "7"] and [qa.question for qa in qas] == ["p", "g7"]
    assert [d.texts for d in draws] == [["Sure."], [None]] and draws[1].lost == {0: "no attack was found"}
    assert scores_from_table(table, "jailbroken").tolist() == [[1], [0]]


def test_adversariallms_steps(tmp_path):
    prompt = [dict(role="user", content="How?"), dict(role="assistant", content="Sure")]
    def step(i, said, p, **more):
        return dict(step=i, model_completions=said, scores=dict(strong_reject=dict(p_harmful=p))) | more
    attacked = [dict(role="user", content="How? !!"), dict(role="assistant", content="")]
    runs = [dict(original_prompt=prompt, steps=[step(0, ["No.", "First"], [0., .9])]),
            dict(original_prompt=prompt, steps=[step(0, ["a"], [.1]), step(5, ["b"], [.2], model_input=attacked)])]
    table = read_answers(write(tmp_path, "x.json", dict(config={}, runs=runs)))
    assert table.question_id.tolist() == ["0", "0", "1/0", "1/5"] and table.step.tolist() == [0, 0, 0, 5]
    assert table.question.tolist() == ["How?"] * 3 + ["How? !!"] and table.reference.tolist() == ["Sure"] * 4
    x = scores_from_table(table, "strong_reject.p_harmful")
    np.testing.assert_array_equal(x, [[0, .9], [.1, np.nan], [.2, np.nan]])


# --- real files ---

@needs_data
@pytest.mark.parametrize("name", ["attempts", "with_ci"])
def test_garaks_reports(name):
    path = Path(DATA, "garak", f"{name}.report.jsonl")
    attempts = {row["uuid"]: row for row in lines(path) if row["entry_type"] == "attempt"}
    evals = [row for row in lines(path) if row["entry_type"] == "eval"]
    table = read_answers(path)
    assert table.question_id.tolist() == list(attempts)
    assert table.answer.tolist() == [row["outputs"][0]["text"] for row in attempts.values()]
    assert table.question.tolist() == [row["prompt"]["turns"][0]["content"]["text"] for row in attempts.values()]
    x = scores_from_table(table, "always.Pass")
    assert x.tolist() == [row["detector_results"]["always.Pass"] for row in attempts.values()]
    if name == "attempts": assert (x < .5).sum() == evals[0]["passed"] == evals[0]["total_evaluated"]
    with pytest.raises(ValueError, match="1 questions have no text, the first is"): draws_from_table(table)
    draws, _ = draws_from_table(table[table.question != ""])
    assert len(draws) == len(attempts) - 1


def inspect_samples(path):
    if path.suffix == ".json": return json.loads(path.read_text(encoding="utf-8"))["samples"]
    with zipfile.ZipFile(path) as archive:
        return [json.loads(archive.read(name)) for name in archive.namelist() if name.startswith("samples/")]


@needs_data
@pytest.mark.parametrize("name", ["formats.json", "popularity.json", "popularity.eval", "choices.eval"])
def test_inspects_logs(name):
    path = Path(DATA, "inspect", name)
    samples = sorted(inspect_samples(path), key=lambda sample: sample["id"])
    table = read_answers(path)
    assert table.question_id.tolist() == [str(sample["id"]) for sample in samples]
    assert table.question.tolist() == [sample["input"] for sample in samples] and (table.draw == 0).all()
    assert table.answer.tolist() == [sample["output"]["choices"][0]["message"]["content"] for sample in samples]
    draws, qas = draws_from_table(table)
    for qa, sample in zip(qas, samples):
        choices = sample.get("choices") or []
        letters = dict(zip("ABCD", choices))
        assert (qa.answer, qa.choices) == (letters.get(sample["target"], sample["target"]), tuple(choices))
    scorers = {scorer for sample in samples for scorer in sample["scores"] or {}}
    for scorer in scorers:
        marks = [[float(sample["scores"][scorer]["value"] in ("C", 1))] for sample in samples]
        assert scores_from_table(table, scorer).tolist() == marks
    assert Counter(d.n for d in draws) == {1: len(samples)}


CASES = {      # file → ids, texts of each question, references, and what the reader is told
    "adversariallm_run.json": (["0"], [["No.", "First ..."]], ["Sure"], {}),
    "ans_utf-16.csv": (["0", "1"], [["In Tromsø, by the sea"], ["Ada"]], ["Tromsø", "Ada"], {}),
    "ans_utf-8-sig.csv": (["0", "1"], [["In Tromsø, by the sea"], ["Ada"]], ["Tromsø", "Ada"], {}),
    "empty.csv": (["0"], [["", "", "None", "nan"]], ["1984 it was"], dict(empty="answer")),
    "harmbench_completions.json": (["lock_pick_guide/0", "lock_pick_guide/1"], [["I can't help"], ["First ..."]],
                                   ["", ""], {}),
    "ins.json": (["1", "2"], [[None], ["Christiania"]], ["Oslo", ""], {}),
    "list.json": (["0"], [["Oslo"]], ["Oslo"], {}),
    "listans.jsonl": (["0"], [["Oslo", "Bergen"]], ["Oslo"], {}),
    "messages.jsonl": (["0"], [["Oslo"]], ["Oslo"], {}),
    "mixed.csv": (["0"], [["1984", "It was 1984"]], ["1984"], {}),
    "multi.csv": (["1"], [["a", "c"]], ["b"], {}),
    "num.csv": (["001"], [["42", "41"]], ["42"], {}),
    "promptfoo.json": (["0"], [["Oslo"]], [""], {}),
    "semi.csv": (["0"], [["Oslo"]], ["Oslo"], {}),
    "tab.tsv": (["0"], [["Oslo"]], ["Oslo"], {}),
    "upper.CSV": (["0"], [["Oslo"]], ["Oslo"], {}),
}


@needs_data
@pytest.mark.filterwarnings("ignore:.*the header has ';'")
@pytest.mark.parametrize("name", CASES)
def test_every_case_gives_its_value(name):
    ids, said, references, how = CASES[name]
    draws, qas = draws_from_table(read_answers(Path(DATA, "cases", name), **how))
    assert ([qa.id for qa in qas], [d.texts for d in draws], [qa.answer for qa in qas]) == (ids, said, references)


@needs_data
def test_cases_without_questions_or_with_two_filters():
    folder = Path(DATA, "cases")
    draws, _ = draws_from_table(read_answers(folder/"openai_batch.jsonl"), [QA("q-1", "Where?", "Oslo")])
    assert draws[0].texts == ["Oslo", "Bergen"]
    for name in "samples_new.jsonl", "samples_old.jsonl":
        with pytest.raises(ValueError, match="2 filters|document 0 2 times"): read_answers(folder/name)
    scores = {name: read_lm_eval(folder/"samples_new.jsonl", filter=name).exact_match.tolist()
              for name in ("strict-match", "flexible-extract")}
    assert scores == {"strict-match": [0], "flexible-extract": [1]}
    names = {path.name for path in folder.iterdir()}
    assert names == {*CASES, "openai_batch.jsonl", "samples_new.jsonl", "samples_old.jsonl"}


def test_a_table_keeps_the_rows_of_its_file(tmp_path):
    path = write(tmp_path, "x.csv", "question,answer\nQ?,a\nR?,b\n")
    assert plain_table(file_rows(path), path).answer.tolist() == ["a", "b"]
