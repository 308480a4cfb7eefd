"""Folders that somebody changed: runs, draws, labels, checkpoints and models are whole and one's own, or refused."""
import json
import pickle
import shutil
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import letters, random_model
from disks import Faulty
from parrot import QAS, SHORT, Parrot
from probunlearn import files
from probunlearn.draws import load_draws
from probunlearn.evaluation import evaluate
from probunlearn.judges import ClassifierJudge, FunctionJudge, judge_answers
from probunlearn.loop import TrainConfig, finetune
from probunlearn.models import load_model, small_model
from probunlearn.reading import report_run
from probunlearn.runs import read_run
from probunlearn.weights import packaged
from servers import script      # noqa: F401, a fixture


def bits(path, place):
    "Turn a bit of a file around."
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << (place % 8)
    path.write_bytes(data)


# --- runs -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")/"run"
    evaluate(Parrot(), QAS, 4, decoding=SHORT, out=folder, progress=False)
    return folder


@pytest.fixture
def run(made, tmp_path): return Path(shutil.copytree(made, tmp_path/"run"))


def changed(**fields):
    "A change of fields of run.json; `...` takes one away."
    def change(folder):
        there = json.loads((folder/"run.json").read_text()) | fields
        (folder/"run.json").write_text(json.dumps({name: value for name, value in there.items() if value is not ...}))
    return change


def text(words): return lambda folder: (folder/"run.json").write_text(words)
def raw(data): return lambda folder: (folder/"run.json").write_bytes(data)


ROW = dict(id="q0", question="Where?", answer="There.")
RUNS = {
    "empty": (text(""), "is not a run's description"), "torn": (text('{"settings": {'), "is not a run's description"),
    "a list": (text("[]"), "must be one JSON object"), "null": (text("null"), "must be one JSON object"),
    "deep": (text("[" * 10**5), "nested too deep"), "bytes": (raw(b"\xff\xfe\x00"), "is not a run's description"),
    "long number": (text('{"planned": ' + "9" * 5000 + "}"), "is not a run's description"),
    "no settings": (changed(settings=...), "field settings must be an object"),
    "settings null": (changed(settings=None), "field settings must be an object"),
    "settings list": (changed(settings=[1]), "field settings must be an object"),
    "made null": (changed(made=None), "field made must be an object"), "made text": (changed(made="x"), "field made"),
    "looks null": (changed(looks=None), "field looks must be a list"),
    "looks object": (changed(looks={}), "field looks"),
    "looks of numbers": (changed(looks=[1]), "field looks must list objects with n and questions"),
    "look without n": (changed(looks=[dict(questions=2)]), "field looks must list objects"),
    "look of nothing": (changed(looks=[dict(n=0, questions=2)]), "field looks must list objects"),
    "look of text": (changed(looks=[dict(n="4", questions=2)]), "field looks must list objects"),
    "look of NaN": (changed(looks=[dict(n=float("nan"), questions=2)]), "field looks must list objects"),
    "planned evil": (changed(planned="evil"), "looks must be the n's"),
    "planned null": (changed(planned=None), "field planned"),
    "planned 10,000,000": (changed(planned=10**7), "a whole number from 1 to 1000"),
    "planned 0": (changed(planned=0), "looks must be"),
    "planned falling": (changed(planned=[8, 4]), "looks must be the n's"),
    "planned empty": (changed(planned=[]), "looks must be"),
    "planned object": (changed(planned={"n": 4}), "looks must be the n's"),
    "planned -1": (changed(planned=-1), "looks must be"),
    "no questions": (changed(questions=...), "field questions must be an object"),
    "questions list": (changed(questions=[]), "field questions must be an object"),
    "group null": (changed(questions=dict(forget=None)), "field questions must hold a list"),
    "question null": (changed(questions=dict(forget=[None])), "is not a run's description"),
    "question text": (changed(questions=dict(forget=["q"])), "is not a run's description"),
    "question without text": (changed(questions=dict(forget=[dict(id="q")])), "question"),
    "question with more": (changed(questions=dict(forget=[dict(ROW, evil=1)])), "evil"),
    "question of number": (changed(questions=dict(forget=[dict(ROW, question=7)])), "QA.question must be"),
    "key words of numbers": (changed(questions=dict(forget=[dict(ROW, keywords=[1])])), "QA.keywords must be"),
    "question twice": (changed(questions=dict(forget=[ROW, ROW])), "duplicate question id 'q0'"),
    "another seed": (lambda folder: changed(settings=dict(read_run(folder).settings, seed=1))(folder), "its checksum"),
    "a look that is gone": (changed(looks=[]), "its checksum isn't that of its content"),
    "a checksum of nothing": (changed(checksum=None), "its checksum isn't that of its content"),
    "in both groups": (changed(questions=dict(forget=[ROW], retain=[ROW])), "duplicate question id 'q0'"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_description_of_the_wrong_shape_is_one_sentence(name, run):
    change, sentence = RUNS[name]
    change(run)
    before = (run/"run.json").read_bytes()
    for read in (read_run, report_run, lambda folder: evaluate(Parrot(), QAS, 4, decoding=SHORT, out=folder,
        progress=False)):
        with pytest.raises(ValueError) as error: read(run)
        said = str(error.value)
        assert sentence in said, said
        assert "run.json is not a run's description" in said and "nothing was changed" in said
    assert (run/"run.json").read_bytes() == before


def table(**columns):
    "A change of columns of a file of draws; `...` takes one away."
    def change(path):
        there = pq.read_table(path)
        for name, values in columns.items():
            at = there.column_names.index(name)
            there = there.remove_column(at) if values is ... else there.set_column(at, name, pa.array(values))
        pq.write_table(there, path)
    return change


DRAWS = {
    "empty": lambda path: path.write_bytes(b""), "text": lambda path: path.write_text("hello"),
    "half": lambda path: path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2]),
    "without its end": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(dict(answer=["x"]))),
    "another table": lambda path: pq.write_table(pa.table(dict(a=[1])), path),
    "numbers for answers": table(answer=[1, 2, 3, 4]), "bytes for answers": table(answer=[b"a"] * 4),
    "lists for answers": table(answer=[["a"]] * 4), "texts for probabilities": table(logprob=["-1"] * 4),
    "whole probabilities": table(logprob=[-1] * 4),
    "short probabilities": table(logprob=pa.array([-1.] * 4, pa.float32())),
    "probabilities above 1": table(logprob=[.5] * 4), "infinite probabilities": table(logprob=[float("inf")] * 4),
    "texts for tokens": table(tokens=["a"] * 4), "fractions for tokens": table(tokens=[[1.5]] * 4),
    "numbers for finished": table(finished=[1] * 4), "no answers": table(answer=...), "no tokens": table(tokens=...),
    "no probabilities": table(logprob=...), "no finished": table(finished=...),
    "no notes": lambda path: pq.write_table(
        pq.read_table(path).replace_schema_metadata(None), path),
    "notes null": lambda path: pq.write_table(
        pq.read_table(path).replace_schema_metadata({b"probunlearn": b"null"}), path),
    "notes deep": lambda path: pq.write_table(
        pq.read_table(path).replace_schema_metadata({b"probunlearn": b"[" * 10**5}), path),
    "notes of another": lambda path: pq.write_table(pq.read_table(path).replace_schema_metadata(
        pq.read_table(path).schema.metadata | {b"fingerprint": b"0" * 16}), path),
    "a folder": lambda path: path.unlink() or path.mkdir(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_file_that_holds_no_draws_is_refused_by_name(name, run):
    path = run/"draws-q0.parquet"
    DRAWS[name](path)
    for read in (lambda: load_draws(path), lambda: report_run(run)):
        with pytest.raises((ValueError, OSError), match="draws-q0.parquet"): read()


COPIES = [("draws-q1", "draws-q0"), ("greedy-q0", "draws-q0"), ("draws-q0", "greedy-q0"), ("greedy-q1", "greedy-q0")]


@pytest.mark.parametrize("source, target", COPIES)
def test_a_file_copied_over_anothers_is_refused(source, target, run):
    shutil.copy(run/f"{source}.parquet", run/f"{target}.parquet")
    with pytest.raises(ValueError, match=f"{target}.parquet holds draws of another run; move it away|don't have"):
        report_run(run)


def test_a_servers_file_copied_over_anothers_is_refused(script, tmp_path):
    server = script(lambda body, *_: (200, dict(choices=[dict(text=body["prompt"], finish_reason="stop")])))
    evaluate(server.endpoint(per_request=1), QAS, 4, out=tmp_path, progress=False)
    for name in ("draws", "greedy"):
        kept = (tmp_path/f"{name}-q0.parquet").read_bytes()
        shutil.copy(tmp_path/f"{name}-q1.parquet", tmp_path/f"{name}-q0.parquet")
        with pytest.raises(ValueError, match=f"{name}-q0.parquet holds draws of another run"): report_run(tmp_path)
        (tmp_path/f"{name}-q0.parquet").write_bytes(kept)
    assert report_run(tmp_path).x.shape == (2, 4)


@pytest.mark.parametrize("part", range(10))
def test_a_turned_bit_is_noticed_by_name_or_changes_nothing(part, made, run):
    path, data = run/"draws-q0.parquet", (made/"draws-q0.parquet").read_bytes()
    expected = load_draws(path).texts
    for place in range(part, len(data), 10 * (1 + len(data) // 400)):
        path.write_bytes(data)
        bits(path, place)
        try: found = load_draws(path)
        except (ValueError, OSError) as e: assert "draws-q0.parquet" in str(e)
        else: assert found.texts == expected


# --- a folder that nobody may write -----------------------------------------------------------------------------------

class ReadOnly(Faulty):
    "Every write is refused."
    def create(self, path): raise OSError(30, "Read-only file system")
    lock = rename = remove = create


def test_reports_are_read_from_a_folder_that_nobody_may_write(run, monkeypatch):
    monkeypatch.setattr(files, "DISK", ReadOnly())
    with pytest.warns(RuntimeWarning, match="can't be written, so this look isn't written down: whoever draws more"):
        report = report_run(run, score="keywords_any")
    assert report.x.shape == (2, 4) and len(read_run(run).looks) == 1
    refused = r"run could not be written \(Read-only file system\).*: that disk is read-only"
    with pytest.raises(OSError, match=refused) as e:
        evaluate(Parrot(), QAS, 8, decoding=SHORT, out=run, progress=False)
    assert ".lock" not in str(e.value)
    with pytest.raises(OSError, match="elsewhere.json could not be written .*: that disk is read-only"):
        report.save(run/"elsewhere")


# --- labels -----------------------------------------------------------------------------------------------------------

KEY = "0123456789abcdef"
def label(value, key=f'"{KEY}"', more=""): return f'{{"key": {key}, "label": {value}{more}}}\n'


NO_LABELS = {
    "a text without a line end": "my notes",
    "a run": '{"settings": {}, "planned": 1}',
    "a list": "[1, 2]\n",
    "rows": '{"a": 1}\n',
    "text": "hello\n",
    "binary": "\x00\x01\n",
    "csv": "key,label\na,1\n",
    "below 0": label(-1),
    "above 1": label(5),
    "NaN": label("NaN"),
    "infinity": label("Infinity"),
    "a word": label('"no"'),
    "null": label("null"),
    "a list of labels": label("[1]"),
    "true": label("true"),
    "another field": label(1, more=', "why": 1'), "no key": '{"label": 1}\n', "a number as key": label(1, key="7"),
    "two lines, one wrong": label(1) + label(2), "half a line within": label(1) + '{"key": "a", "la\n' + label(1),
    "deep": "[" * 10**5 + "\n",
    "a page": "<html></html>\n",
    "its beginning by chance": '{"key": 7',
    "a long number": label("9" * 5000),
}


@pytest.mark.parametrize("name", NO_LABELS)
def test_a_file_that_is_not_surely_one_of_labels_is_left_alone(name, tmp_path):
    out = tmp_path/"labels"
    out.write_text(NO_LABELS[name])
    asked = []
    judge = FunctionJudge(lambda answer, qa: asked.append(1) or 1, "mine")
    with pytest.raises(ValueError, match="is no file of labels .*pass another one as out; nothing was changed"):
        judge_answers([(QAS[0], "a")], judge, out=out, progress=False)
    assert out.read_text() == NO_LABELS[name] and not asked


def test_two_who_write_one_file_of_labels_lose_nothing(tmp_path, monkeypatch):
    "Each adds labels between the other's reading and writing; without a lock one of them would be overwritten."
    from concurrent.futures import ThreadPoolExecutor
    ticks = iter(range(0, 10**9, 2))
    monkeypatch.setattr("probunlearn.judges.time.monotonic", lambda: next(ticks))
    monkeypatch.setattr(files, "DISK", Faulty())
    def judge(who):
        pairs = [(QAS[0], f"{who} {i}") for i in range(20)]
        judge_answers(pairs, FunctionJudge(lambda answer, qa: .5, "half"), out=tmp_path/"labels", progress=False)
    with ThreadPoolExecutor(4) as pool: list(pool.map(judge, range(4)))
    assert len((tmp_path/"labels").read_text().splitlines()) == 80


# --- checkpoints ------------------------------------------------------------------------------------------------------

def train(folder, steps=3):
    model = random_model(vocab=16, seed=3)
    finetune(model, letters(4, seed=1), TrainConfig(steps=steps, batch_size=2, lr=1e-2, checkpoint=str(folder),
        checkpoint_every=1))
    return model


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    train(folder)
    return folder/"run.safetensors"


def header(path):
    with open(path, "rb") as file: return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))["__metadata__"]


def tensors(change, sealed=False):
    "A change of a checkpoint's tensors; without a seal the file is as earlier versions wrote it."
    def changed(path):
        there, said = load_file(path), header(path)
        change(there)
        save_file(there, path, said if sealed else dict(notes=said["notes"]))
    return changed


def told(**fields):
    "A change of a checkpoint's notes, as earlier versions wrote them."
    def changed(path):
        there, said = load_file(path), json.loads(header(path)["notes"]) | fields
        save_file(there, path, dict(notes=json.dumps(said)))
    return changed


def drop(part):
    def change(there): del there[next(name for name in there if name.startswith(part))]
    return change


def drop_all(part):
    def change(there):
        for name in [name for name in there if name.startswith(part)]: del there[name]
    return change


def put(part, value):
    def change(there):
        name = next(name for name in there if name.startswith(part) and there[name].ndim)
        there[name].view(-1)[0] = value
    return change


def reshaped(there):
    name = next(name for name in there if name.startswith("weights/"))
    there[name] = there[name].flatten()


STATES = {
    "a weight is missing": (tensors(drop("weights/")), "weights '.*' is missing"),
    "all weights are missing": (tensors(drop_all("weights/")), "weights '.*' is missing"),
    "a moment is missing": (tensors(drop("moments/")), "moments '.*' is missing"),
    "all moments are missing": (tensors(drop_all("moments/")), "moments '.*' is missing"),
    "the random state is missing": (tensors(drop_all("random/")), "the random state is missing"),
    "another random state": (tensors(lambda t: t.update({"random/cpu": torch.zeros(3, dtype=torch.uint8)})),
        "random state is another's"),
    "a weight too many": (tensors(lambda t: t.update({"weights/evil": torch.ones(2)})),
        "weights 'evil' is not of this model"),
    "rows too many": (tensors(lambda t: t.update({"weights/lm_head.weight": torch.ones(99, 32)})),
        "lm_head.weight' has the shape"),
    "a flat weight": (tensors(reshaped), "has the shape"),
    "another part": (tensors(lambda t: t.update({"evil": torch.ones(2)})), "holds 'evil'"),
    "a weight is NaN": (tensors(put("weights/", float("nan"))), "weights '.*' holds NaN"),
    "a moment is NaN": (tensors(put("moments/", float("nan"))), "moments '.*' holds NaN"),
    "a moment is infinite": (tensors(put("moments/", float("inf"))), "moments '.*' holds NaN or infinity"),
    "another weight": (tensors(put("weights/", 7.), sealed=True), "don't fit its hash"),
    "a sealed weight is missing": (tensors(drop("weights/"), sealed=True), "don't fit its hash"),
    "a sealed moment is missing": (tensors(drop("moments/"), sealed=True), "don't fit its hash"),
    "sealed moments are missing": (tensors(drop_all("moments/"), sealed=True), "don't fit its hash"),
    "no notes": (lambda path: save_file(load_file(path), path), "its header has no notes"),
    "notes that are no JSON": (lambda path: save_file(load_file(path), path, dict(notes="{")), "its notes is not JSON"),
    "a list of notes": (lambda path: save_file(load_file(path), path, dict(notes="[]")),
        "its notes are no JSON object"),
    "deep notes": (lambda path: save_file(load_file(path), path, dict(notes="[" * 10**5)), "nested too deep"),
    "no run": (told(run=None), "its notes tell no run"),
    "rows null": (told(rows=None), "no row of numbers for each update"),
    "a row is missing": (told(rows=[dict(step=2, loss=1.)]), "no row of numbers for each update"),
    "rows of text": (told(rows=[dict(step=1, loss="x")]), "no row of numbers"),
    "a row of null": (told(rows=[None]), "no row of numbers"),
    "more rows than updates": (told(rows=[dict(step=i + 1, loss=1.) for i in range(9)]),
        "it is 9 updates far, and the run has 3"),
    "best of another kind": (told(best=7), "the best update is 7"),
    "best to come": (told(best=[99, 0]), "the best update is"),
    "empty": (lambda path: path.write_bytes(b""), "is no whole checkpoint"),
    "text": (lambda path: path.write_text("hello" * 9), "is no whole checkpoint"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is no whole checkpoint"),
    "a pickle": (lambda path: torch.save(dict(a=1), path), "is no whole checkpoint"),
    "an endless header": (lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]), "is no whole checkpoint"),
    "another run": (told(run=dict(model="other")), "holds a run with another"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_checkpoint_that_is_not_whole_is_refused_and_stays(name, state, tmp_path):
    change, sentence = STATES[name]
    there = Path(shutil.copy(state, tmp_path/"run.safetensors"))
    change(there)
    before = there.read_bytes()
    with pytest.raises(ValueError, match=sentence) as error: train(tmp_path)
    assert "run.safetensors" in str(error.value) and there.read_bytes() == before


def test_a_checkpoint_of_before_seals_is_taken(state, tmp_path):
    there = Path(shutil.copy(state, tmp_path/"run.safetensors"))
    tensors(lambda t: None)(there)
    assert torch.equal(train(tmp_path).lm.lm_head.weight, train(tmp_path/"again").lm.lm_head.weight)


@pytest.mark.parametrize("part", range(10))
def test_a_turned_bit_of_a_checkpoint_is_noticed(part, state, tmp_path):
    size = state.stat().st_size
    for place in range(size * part // 10, size, size // 2):
        there = Path(shutil.copy(state, tmp_path/"run.safetensors"))
        bits(there, place + part)
        with pytest.raises(ValueError, match="run.safetensors"): train(tmp_path)


# --- models -----------------------------------------------------------------------------------------------------------

class Runs:
    def __reduce__(self): return (Path.touch, (Path("owned"),))


def config(**fields):
    def change(folder):
        there = json.loads((folder/"config.json").read_text()) | fields
        (folder/"config.json").write_text(json.dumps({name: value for name, value in there.items()
            if value is not ...}))
    return change


def put_text(name, words): return lambda folder: (folder/name).write_text(words)


def weights(change):
    def changed(folder):
        there = load_file(folder/"model.safetensors")
        change(there)
        save_file(there, folder/"model.safetensors", dict(format="pt"))
    return changed


def cut(share):
    def changed(folder):
        path = folder/"model.safetensors"
        path.write_bytes(path.read_bytes()[:share])
    return changed


def only_a_pickle(folder):
    (folder/"model.safetensors").unlink()
    with open(folder/"pytorch_model.bin", "wb") as file: pickle.dump(Runs(), file)


MODELS = {
    "no config": (lambda folder: (folder/"config.json").unlink(), "config.json"),
    "empty config": (put_text("config.json", ""), "broken"),
    "torn config": (put_text("config.json", "{"), "broken"),
    "deep config": (put_text("config.json", "[" * 10**5), "broken or cut off"),
    "config of text": (put_text("config.json", '"hello"'), "names no model_type"),
    "no kind": (config(model_type=...), "names no model_type"),
    "unknown kind": (config(model_type="evil"), "knows no 'evil' models"),
    "an encoder": (config(model_type="bert"), "doesn't write from left to right"),
    "code of its own": (config(model_type="evil", auto_map=dict(AutoModelForCausalLM="evil.Evil")),
        "brings code of its own"),
    "another width": (config(hidden_size=8), "belong to different models"),
    "another vocabulary": (config(vocab_size=7), "belong to different models"),
    "layers missing": (config(num_hidden_layers=9), "45 weights are missing"),
    "no weights": (lambda folder: (folder/"model.safetensors").unlink(), "a file is missing"),
    "empty weights": (cut(0), "broken or cut off"),
    "a header only": (cut(100), "broken or cut off"), "half of the weights": (cut(50_000), "broken or cut off"),
    "a weight missing": (weights(drop("model.layers.1")), "weights are missing"),
    "a flat weight": (weights(lambda t: t.update(
        {"model.norm.weight": torch.ones(3)})), "the weight model.norm.weight has the shape"),
    "a pickle": (only_a_pickle, "a pickle can run code"),
    "no tokenizer": (lambda folder: (folder/"tokenizer.json").unlink(), "tokenizer"),
    "empty tokenizer": (put_text("tokenizer.json", ""), "the tokenizer can't be read"),
    "odd tokenizer": (put_text("tokenizer.json", '{"model": 7}'), "the tokenizer can't be read"),
    "deep tokenizer": (put_text("tokenizer.json", "[" * 10**5), "the tokenizer can't be read"),
    "null tokenizer": (put_text("tokenizer.json", "null"), "the tokenizer can't be read"),
    "odd tokenizer config": (put_text("tokenizer_config.json", "[]"), "the tokenizer can't be read"),
    "torn template": (put_text("probunlearn_template.json", "{"), "is no template of a model"),
    "template of a list": (put_text("probunlearn_template.json", "[1]"), "is no template"),
    "template without a question": (put_text("probunlearn_template.json", '{"prompt": "hello"}'),
        "is no template of a model"),
    "template with more": (put_text("probunlearn_template.json", '{"evil": 1}'), "is no template of a model"),
    "deep template": (put_text("probunlearn_template.json", "[" * 10**5), "is no template of a model"),
    "template of a number": (put_text("probunlearn_template.json", '{"system": 7}'), "is no template of a model"),
    "an adapter without a base": (put_text("adapter_config.json", "{}"), "names no base_model_name_or_path"),
    "an adapter of a list": (put_text("adapter_config.json", "[]"), "names no base_model_name_or_path"),
    "an adapter that is no JSON": (put_text("adapter_config.json", "["), "broken or cut off"),
}


@pytest.fixture
def model_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(packaged("retain"), tmp_path/"model"))


@pytest.mark.parametrize("name", MODELS)
def test_a_broken_model_is_one_sentence_and_runs_nothing(name, model_folder, monkeypatch):
    change, sentence = MODELS[name]
    change(model_folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises((ValueError, OSError), match=sentence) as error: load_model(model_folder, device="cpu")
    assert "model" in str(error.value) and not Path("owned").exists()


def test_a_judge_runs_no_code_and_asks_nobody(model_folder, monkeypatch):
    config(model_type="evil", auto_map=dict(AutoModelForSequenceClassification="evil.Evil",
        AutoConfig="evil.Config"))(model_folder)
    (model_folder/"evil.py").write_text("open('owned', 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises((ValueError, OSError)): ClassifierJudge(str(model_folder), "toxic")
    with pytest.raises(FileNotFoundError, match="models/judge .and no hub is asked"):
        ClassifierJudge("models/judge", "toxic")
    assert not Path("owned").exists()


def test_a_model_that_cannot_be_written_leaves_the_old_one(model_folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in model_folder.iterdir()}
    monkeypatch.setattr(files, "DISK", ReadOnly())
    with pytest.raises(OSError, match="model could not be written .*: that disk is read-only"):
        small_model("full").save(model_folder)
    assert {p.name: p.read_bytes() for p in model_folder.iterdir()} == before
