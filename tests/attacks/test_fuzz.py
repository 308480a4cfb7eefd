"""Every reader on whatever bytes: a value, or an error that names the file, within limits of time and memory."""
import io
import json
import resource
import struct
import warnings
import zipfile
from datetime import timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disks import Faulty, with_disk
from parrot import QAS, SHORT, Parrot
from probunlearn.checkpoints import _read_parts, read_notes
from probunlearn.data import Template, load_qa
from probunlearn.draws import draws_from_texts, load_draws, save_draws
from probunlearn.evaluation import evaluate
from probunlearn.formats import read_answers
from probunlearn.grid import read_grid
from probunlearn.judges import _kept
from probunlearn.limits import check_chat
from probunlearn.reading import report_run
from probunlearn.report import Report, as_json
from probunlearn.runs import read_run
from probunlearn.verification import verify
from probunlearn.weights import adapter_base

FEW = settings(max_examples=15, deadline=timedelta(seconds=10), database=None, derandomize=True,
               suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=2000)
FEWER = settings(FEW, max_examples=5)           # a report is made again each time, with its drawings

words = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["question", "answer", "anytime", "\ud800"]))
FIELDS = """id question answer keywords choices settings looks planned made questions n forget key label notes prompt
system chat""".split()
names = st.one_of(st.text(max_size=8), st.sampled_from(FIELDS))
plain = st.recursive(words, lambda inner: st.one_of(st.lists(inner, max_size=4),
    st.dictionaries(names, inner, max_size=5)), max_leaves=12)
rows = st.fixed_dictionaries({}, optional=dict(id=words, question=st.one_of(words, st.text(min_size=1)), answer=words,
    keywords=plain, choices=plain, alternatives=plain))


def damaged(whole):
    "Bytes of a good file: cut, with bytes changed, put in or taken out."
    places, bits = st.integers(0, 10**6), st.binary(max_size=8)
    def change(parts):
        data = bytearray(whole)
        for place, new, taken in parts: data[place % (len(data) + 1):place % (len(data) + 1) + taken] = new
        return bytes(data)
    return st.lists(st.tuples(places, bits, st.integers(0, 50)), max_size=4).map(change)


def text(value): return value.map(lambda v: json.dumps(v).encode())


def lines(row): return st.lists(text(row), max_size=5).map(b"\n".join)


def good_draws(folder):
    save_draws(draws_from_texts("q", ["a", "b", "a"], decoding=SHORT), folder/"good.parquet")
    return (folder/"good.parquet").read_bytes()


def good_run(folder):
    evaluate(Parrot(), QAS, 4, decoding=SHORT, out=folder/"good", progress=False)
    there = json.loads((folder/"good"/"run.json").read_text())
    del there["checksum"]               # which would stop nearly all of them
    return there


def places(value, at=()):
    "The ways to all values inside a value, and to itself."
    yield at
    if isinstance(value, dict): inner = value.items()
    else: inner = enumerate(value) if isinstance(value, list) else ()
    for name, part in inner: yield from places(part, (*at, name))


def put(value, at, new):
    "A value with another one in a place."
    if not at: return new
    parts = dict(value) if isinstance(value, dict) else list(value)
    parts[at[0]] = put(parts[at[0]], at[1:], new)
    return parts


def altered(good):
    "A good value with something else in one of its places."
    return st.tuples(st.sampled_from(list(places(good))), plain).map(lambda pair: put(good, *pair))


def as_lines(rows):
    return b"\n".join(json.dumps(row).encode() for row in (rows if isinstance(rows, list) else [rows]))


def zipped(sample):
    "inspect's .eval with one sample."
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive: archive.writestr("samples/1_epoch_1.json", json.dumps(sample))
    return sink.getvalue()


SAMPLE = dict(id=1, epoch=1, input="Why?", target="So.", scores=dict(match=dict(value="C")),
              output=dict(choices=[dict(message=dict(content="So."), stop_reason="stop")]))
# one answer in each notation: what other tools write
TOOLS = dict(
    lm_eval=[dict(doc_id=0, doc=dict(q="Why?"), target="So.", arguments=dict(gen_args_0=dict(arg_0="Why?")),
                  resps=[["So."]], filtered_resps=["So."], exact_match=1.)],
    inspect=dict(status="success", samples=[SAMPLE]),
    leak_k=[dict(prompt="Why?", ground_truth="So.", responses=["So.", dict(response="No.", rougeL_recall=0.)])],
    batch=[dict(custom_id="a", error=None, response=dict(status_code=200, body=dict(
        choices=[dict(index=0, message=dict(content="So."))])))],
    garak=[dict(entry_type="attempt", uuid="u", prompt=dict(turns=[dict(role="user", content=dict(text="Why?"))]),
                outputs=[dict(text="So.")], detector_results=dict(d=[1.]), probe_classname="p", goal="g")],
    jailbreakbench=dict(jailbreaks=[dict(index=0, goal="g", behavior="b", category="c", prompt="Why?", response="So.",
                                         jailbroken=True)]),
    adversariallm=dict(runs=[dict(original_prompt=[dict(role="user", content="Why?"), dict(role="assistant",
        content="So.")], steps=[dict(step=0, model_completions=["So."], scores=dict(j=dict(p=[.5])))])]),
    promptfoo=dict(results=dict(results=[dict(vars=dict(question="Why?", expected="So."), prompt=dict(raw="Why?"),
        provider=dict(id="m"), response=dict(output="So."), success=True, score=1, promptIdx=0)])),
    harmbench=dict(b=[dict(test_case="Why?", generation="So.", label=1)]),
    open_unlearning=dict(forget_Q_A_ROUGE=dict(agg_value=.5, value_by_index={"0": dict(rougeL_recall=.5, input="Why?",
        ground_truth="So.", generation="No.")})),
    tofu=dict(avg_gt_loss={"0": 1.5}, generated_text={"0": ["Why?", "So.", "So."]}, rougeL_recall={"0": .5},
              average_perturb_loss={"0": [1., 2.]}),
    table=[dict(question="Why?", answer="So.", reference="So.", draw=0)],
)


def report_json(folder):
    "A reader of reports that makes each again from the run beside it, and whatever may stand there."
    evaluate(Parrot(), QAS, 4, decoding=SHORT, out=folder, progress=False)
    report = report_run(folder)
    good = json.loads(json.dumps(as_json(report)))
    return Reader(lambda path: verify(folder, path), "report.json", st.one_of(text(altered(good)), text(plain),
        damaged(json.dumps(good).encode())))


CELL = dict(name="gd", split="s", seed=0, row=dict(name="gd", bound=.5), versions={},
            settings=dict(config={}, lora=0, options=dict(alpha=.01)))


def tensors(said):
    "A safetensors file with such a header."
    header = json.dumps(said).encode()
    return struct.pack("<Q", len(header)) + header + bytes(64)



def parquet(columns):
    sink = pa.BufferOutputStream()
    try: pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), sink)
    except (pa.ArrowException, TypeError, ValueError): return b""
    return sink.getvalue().to_pybytes()


def column(): return st.one_of(*(st.lists(kind, min_size=3, max_size=3)
    for kind in (st.text(max_size=3), st.integers(-9, 9), st.floats(), st.booleans(), st.none())))


COLUMNS = st.fixed_dictionaries({}, optional={name: column()
    for name in ("answer", "logprob", "tokens", "finished", "lost")})
PIECES = [
    "{{ ",
    " }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if ",
    "m.content",
    "messages",
    " %}",
    "[0]",
    "|tojson",
    "|length",
    "x",
    " ",
    "'a'",
    "+",
    "~",
    "* 3",
          "{% set x = ",
          "{% endif %}",
          "range(9)",
          "|center(9)",
          "{#",
          "#}",
          "{% macro f() %}",
          "{% endmacro %}",
          "raise_exception('no')",
          "namespace()",
          ".",
          "__class__",
          "\n"]


class Reader:
    "A reader, its file's name, and what it may find there."
    def __init__(self, read, name, contents): self.read, self.name, self.contents = read, name, contents


def run_json(folder):
    good = good_run(folder)
    return st.one_of(text(plain), st.dictionaries(st.sampled_from(list(good)), plain,
        max_size=3).map(lambda more: json.dumps(good | more).encode()),
                     damaged(json.dumps(good).encode()), st.binary(max_size=40))


GOOD_CSV = b'id,question,answer,keywords\n1,"Why, then?",So.,so\n2,Where?,There.,"a, b"\n'
HEADERS = st.one_of(plain, st.dictionaries(names,
    st.fixed_dictionaries({}, optional=dict(dtype=st.sampled_from(["F32", "U8", "X"]), shape=plain,
        data_offsets=plain)), max_size=3),
                    st.fixed_dictionaries(dict(__metadata__=st.dictionaries(st.sampled_from(["notes", "seal"]),
                        st.text(max_size=20)))))
READERS = {
    "json": lambda folder: Reader(load_qa, "x.json",
        st.one_of(text(plain), text(st.lists(rows, max_size=3)), st.binary(max_size=60))),
    "jsonl": lambda folder: Reader(load_qa, "x.jsonl",
        st.one_of(lines(plain), lines(rows), damaged(b'{"question": "a", "answer": "b"}\n' * 3))),
    "csv": lambda folder: Reader(load_qa, "x.csv",
        st.one_of(damaged(GOOD_CSV), st.binary(max_size=60),
            st.text(max_size=60).map(lambda t: t.encode(errors="replace")))),
    "parquet": lambda folder: Reader(load_draws, "x.parquet",
        st.one_of(damaged(good_draws(folder)), COLUMNS.map(parquet), st.binary(max_size=60))),
    "run.json": lambda folder: Reader(lambda path: read_run(path.parent), "run.json", run_json(folder)),
    "safetensors": lambda folder: Reader(_read_parts, "x.safetensors",
        st.one_of(HEADERS.map(tensors), st.binary(max_size=90),
            damaged(tensors(dict(a=dict(dtype="F32", shape=[4], data_offsets=[0, 16])))))),
    "notes": lambda folder: Reader(read_notes, "x.safetensors",
        st.one_of(plain.map(lambda v: tensors(dict(__metadata__=dict(notes=json.dumps(v))))), HEADERS.map(tensors))),
    "report": report_json,
    "a tool's file": lambda folder: Reader(read_answers, "x.jsonl", st.one_of(lines(plain),
        *(altered(good).map(as_lines) for good in TOOLS.values()))),
    "a zipped log": lambda folder: Reader(read_answers, "x.eval", st.one_of(altered(SAMPLE).map(zipped),
        damaged(zipped(SAMPLE)))),
    "a cell": lambda folder: Reader(lambda path: read_grid(path.parent), "x,seed0.json", st.one_of(
        text(altered(CELL)), text(plain),
        damaged(json.dumps(CELL).encode()))),
    "adapter": lambda folder: Reader(lambda path: adapter_base(path.parent, {}), "adapter_config.json",
        st.one_of(text(plain), text(altered(dict(base_model_name_or_path="base", revision="main"))),
                  st.binary(max_size=60))),
    "labels": lambda folder: Reader(_kept, "labels",
        st.one_of(lines(plain), damaged(b'{"key": "0123456789abcdef", "label": 1.0}\n' * 3), st.binary(max_size=60))),
}


def fuzzed(name, folder, how):
    "Read many files; only errors that name the file, in little memory."
    with with_disk(Faulty()): reader = READERS[name](folder)
    path = folder/reader.name
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    @how
    @given(reader.contents)
    def reads(data):
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: reader.read(path)
            except (ValueError, OSError) as e: assert reader.name in str(e), f"{type(e).__name__}: {e}"
    reads()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000         # kilobytes


@pytest.mark.parametrize("name", READERS)
def test_a_reader_on_whatever_bytes(name, tmp_path): fuzzed(name, tmp_path, FEW if name != "report" else FEWER)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_reader_on_many_files(name, tmp_path, monkeypatch):
    "A report's drawings take nearly all of its time, and come from its run, not from what is read: here it has none."
    monkeypatch.setattr("probunlearn.report.picture", lambda plot: (b"\x89PNG", ""))
    monkeypatch.setattr(Report, "body", lambda self, digest="": f"<p>{self.name} {digest}</p>")
    fuzzed(name, tmp_path, MANY)


def chatted(how):
    @how
    @given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
    def renders(template):
        try: check_chat(template, dict(messages=[dict(role="user", content="why?")], add_generation_prompt=True))
        except ValueError as e: assert "the chat template" in str(e)
    renders()


def test_a_chat_template_of_any_pieces(): chatted(FEW)


@pytest.mark.slow
def test_many_chat_templates(): chatted(MANY)


@FEW
@given(st.text(max_size=40))
def test_a_template_of_any_text(prompt):
    try: Template(prompt=prompt)
    except ValueError as e: assert "a template needs" in str(e) or "half a character" in str(e)
