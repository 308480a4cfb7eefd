"""Kills at every write, power cuts that drop what wasn't synced, full disks: old or new, and a rerun finishes."""
import hashlib
import json
import random
import re
import resource
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import letters, random_model
from disks import Faulty, Forgetful, Killed, spread, steps_of, with_disk
from parrot import QAS, SHORT, Parrot
from probunlearn.evaluation import evaluate
from probunlearn.files import finish, replacing_folder
from probunlearn.judges import FunctionJudge, judge_answers
from probunlearn.loop import TrainConfig, finetune
from probunlearn.models import small_model
from probunlearn.reading import report_run
from probunlearn.report import Report
from probunlearn.runs import read_run
from probunlearn.training import UnlearnConfig, unlearn
from probunlearn.weights import WEIGHTS, write_weights
from servers import Script, varied

N = 12


class Work:
    "What is killed: `begin` makes the old state, `go` the new, `check` says what may be there meanwhile, `end` tidies."
    def __init__(self, folder): self.folder = folder
    def begin(self): pass
    def check(self): pass
    def end(self): pass


def make(folder):
    folder.mkdir()
    return folder


def leftovers(folder): return sorted(p.name for p in folder.rglob("*") if p.is_file() and ".tmp" not in str(p))


class Evaluating(Work):
    "A run of four draws is extended to twelve."
    model = Parrot()
    def run(self, n): return evaluate(self.model, QAS, n, decoding=SHORT, out=self.folder/"run", progress=False)
    def begin(self): self.run(4)
    def go(self): self.run(N)

    def check(self):
        run = read_run(self.folder/"run")
        assert [look["n"] for look in run.looks] in ([4], [4, N])
        for qa in QAS:
            d = run.draws(qa)
            assert d.n in (4, 8, N) and d.texts == [self.model.said(qa, i) for i in range(d.n)]
            assert run.draws(qa, "greedy").texts == ["No."]

    def result(self): return report_run(self.folder/"run", n=N).x.tolist()


class Asking(Evaluating):
    "The same, of a server."
    @property
    def model(self): return self.server.endpoint(per_request=4, workers=1)
    def begin(self):
        self.server = Script(lambda body, *_: (200, varied(body)))
        self.run(4)
    def check(self):
        run = read_run(self.folder/"run")
        for qa in QAS: assert run.draws(qa).n in (4, 8, N) and None not in run.draws(qa).texts
    def result(self): return [sorted(read_run(self.folder/"run").draws(qa).texts) for qa in QAS]
    def end(self):
        self.server.shutdown()
        self.server.server_close()


class Teaching(Work):
    "Four updates with a checkpoint after each."
    def train(self, checkpoint):
        self.model = random_model(vocab=16, seed=3)
        config = TrainConfig(steps=4, batch_size=2, lr=1e-2, checkpoint=checkpoint, checkpoint_every=1)
        finetune(self.model, letters(4, seed=1), config)
    def go(self): self.train(str(self.folder/"state"))
    def result(self): return torch.cat([p.detach().flatten() for p in self.model.lm.parameters()]).tolist()


class Unlearning(Teaching):
    "The same with two data sets, and the best weights kept."
    def train(self, checkpoint):
        self.model = random_model(vocab=16, seed=3)
        config = UnlearnConfig(steps=3, batch_size=2, lr=1e-2, checkpoint=checkpoint, checkpoint_every=1)
        unlearn(self.model, letters(4, seed=1), letters(4, seed=2), config)


class Judging(Work):
    "Labels are added to those of an earlier run."
    def judge(self, count):
        pairs = [(qa, f"answer {i}") for qa in QAS for i in range(count)]
        how = dict(out=self.folder/"labels.jsonl", progress=False)
        return judge_answers(pairs, FunctionJudge(lambda answer, qa: int(answer[-1]) % 2, "odd", batch_size=2), **how)
    def begin(self): self.judge(2)
    def go(self): self.found = self.judge(6)
    def check(self): assert 4 <= self.known() <= 12
    def known(self): return len((self.folder/"labels.jsonl").read_text().splitlines())
    def result(self): return self.known(), self.found[0]


class Saving(Work):
    "A report replaces another one."
    def report(self, n): return evaluate(Parrot(), QAS, n, decoding=SHORT, progress=False)
    def begin(self):
        self.old, self.new = self.report(4), self.report(N)
        self.old.save(self.folder/"report.html")
    def go(self): self.new.save(self.folder/"report.html")

    def check(self):
        digest = hashlib.sha256((self.folder/"report.json").read_bytes()).hexdigest()
        json.loads((self.folder/"report.json").read_text())
        for suffix in (".html", ".md"):
            page = self.folder/f"report{suffix}"
            assert not page.exists() or digest in page.read_text()

    def result(self): return {p.name: p.read_bytes() for p in self.folder.iterdir() if not p.name.endswith(".tmp")}


class Storing(Work):
    "A model replaces another one in its folder, where somebody keeps notes."
    def begin(self):
        rooms = {1: 128, 2: 64}
        self.models = [random_model(vocab=16, seed=seed, dtype=torch.float32, max_position_embeddings=rooms[seed])
            for seed in rooms]
        for model in self.models: model.tok = small_model().tok
        self.models[0].save(self.folder/"m")
        (self.folder/"m"/"notes.txt").write_text("mine")
    def go(self): self.models[1].save(self.folder/"m")

    def fits(self):
        "Whether configuration and weights are those of one of the two models."
        room = json.loads((self.folder/"m"/"config.json").read_text())["max_position_embeddings"]
        weights = load_file(self.folder/"m"/"model.safetensors")["lm_head.weight"]
        return any(model.lm.config.max_position_embeddings == room and torch.equal(weights, model.lm.lm_head.weight)
                   for model in self.models)

    def check(self):
        if (self.folder/"m"/"config.json").exists(): assert self.fits()     # for readers who know nothing of us, too
        finish(self.folder/"m", "config.json", WEIGHTS)
        assert self.fits()

    def result(self):
        assert (self.folder/"m"/"notes.txt").read_text() == "mine"
        assert not [*(self.folder/"m").glob("*.saved*")]
        return leftovers(self.folder/"m")


WORKS = dict(evaluate=Evaluating, endpoint=Asking, finetune=Teaching, unlearn=Unlearning, labels=Judging, report=Saving,
             model=Storing)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "Labels are written after each batch, and a report is drawn in no time."
    ticks = iter(range(0, 10**9, 2))
    monkeypatch.setattr("probunlearn.judges.time.monotonic", lambda: next(ticks))
    monkeypatch.setattr("probunlearn.report.picture", lambda plot: (b"\x89PNG", ""))
    monkeypatch.setattr(Report, "body", lambda self, digest="": f"<p>{self.name} {digest}</p>")
    monkeypatch.setattr(Report, "card", lambda self, digest="": f"{self.name} {digest}")
    with warnings.catch_warnings(), with_disk(Faulty()):        # which doesn't wait for the real one
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    "What each work ends with when nothing fails, and its steps; made once."
    known = {}
    def of(name, kind=Faulty):
        if (name, kind) not in known:
            work = WORKS[name](tmp_path_factory.mktemp(name))
            work.begin()
            known[name, kind] = steps_of(work.go, kind), work.result()
            work.end()
        return known[name, kind]
    return of


def killed(work, disk):
    "The work on a disk that dies; whether it did."
    with with_disk(disk):
        try: work.go()
        except Killed: return True
    return False


def dies(name, step, expected, folder):
    "One work that is killed at a step, then done again."
    _, result = expected(name)
    work = WORKS[name](folder)
    work.begin()
    assert killed(work, Faulty(die_at=step))
    work.check()
    work.go()
    work.check()
    assert work.result() == result
    work.end()


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("point", range(20))
def test_a_kill_leaves_old_or_new_and_a_rerun_finishes(name, point, expected, tmp_path):
    points = spread(expected(name)[0].steps)
    assert len(points) == 20
    dies(name, points[point], expected, tmp_path)


FEW_STEPS = ["evaluate", "labels", "report", "model"]


@pytest.mark.parametrize("name", FEW_STEPS)
def test_a_kill_at_every_other_step(name, expected, tmp_path):
    "Each step that the twenty before left out, so that no two writes have a gap between them that wasn't tried."
    steps = expected(name)[0].steps
    for step in {*range(1, steps + 1)} - {*spread(steps)}: dies(name, step, expected, make(tmp_path/str(step)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WORKS if name not in FEW_STEPS])
def test_a_kill_at_every_step_of_many(name, expected, tmp_path):
    for step in range(1, expected(name)[0].steps + 1): dies(name, step, expected, make(tmp_path/str(step)))


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("point", range(20))
def test_a_power_cut_leaves_old_or_new_and_a_rerun_finishes(name, point, expected, tmp_path):
    clean, result = expected(name, Forgetful)
    work = WORKS[name](tmp_path)
    work.begin()
    disk = Forgetful(die_at=spread(clean.steps)[point], seed=point)
    assert killed(work, disk)
    disk.cut()
    work.check()
    work.go()
    work.check()
    assert work.result() == result
    work.end()


@pytest.mark.parametrize("name", WORKS)
def test_what_is_finished_outlives_a_power_cut(name, expected, tmp_path):
    _, result = expected(name, Forgetful)
    work = WORKS[name](tmp_path)
    work.begin()
    with with_disk(Forgetful()) as disk: work.go()
    assert not disk.pending and not disk.before         # nothing waits
    disk.cut()
    assert work.result() == result
    work.end()


SAID = r"(.+) could not be written \({}\); what was there is whole: make room and go on"
FULL, LONG = SAID.format("No space left on device"), SAID.format("File too large")


def filled(name, room, expected, folder):
    "One work on a disk with so much room, then on one with enough."
    _, result = expected(name)
    work = WORKS[name](folder)
    work.begin()
    before = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with with_disk(Faulty(room=room)), pytest.raises(OSError) as error: work.go()
    file = Path(re.fullmatch(FULL, str(error.value))[1])
    assert file.is_relative_to(folder) and not file.name.startswith(".")
    assert file.suffix or name == "model" and file.is_dir()             # whose folder is moved as a whole
    work.check()
    there = {p.name for p in folder.rglob("*") if p.is_file()}
    assert before.keys() <= there and not [*folder.rglob("*.tmp")]
    work.go()
    work.check()
    assert work.result() == result
    work.end()


MANY = 60           # writes: more than that, of a server's run or of each tensor in each checkpoint, take their time


@pytest.mark.parametrize("name", WORKS)
def test_a_disk_that_is_full_at_any_write(name, expected, tmp_path):
    "Each write of a small run, labels, a report and a model; some of the many of a server's run and of a training."
    points = expected(name)[0].boundaries
    for room in points if len(points) < MANY else points[::25]: filled(name, room, expected, tmp_path/str(room))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["endpoint", "finetune", "unlearn"])
def test_a_disk_that_is_full_at_any_of_many_writes(name, expected, tmp_path):
    for room in expected(name)[0].boundaries: filled(name, room, expected, tmp_path/str(room))


def further(name, count, expected, folder):
    "A disk that is full after so many other numbers of bytes."
    clean, _ = expected(name)
    rooms = random.Random(0).sample(range(clean.used - 1), min(count, clean.used - 1))
    for room in rooms: filled(name, room, expected, folder/str(room))


def test_a_disk_that_is_full_at_further_bytes(expected, tmp_path): further("evaluate", 50, expected, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_a_disk_that_is_full_at_200_further_bytes(name, expected, tmp_path): further(name, 200, expected, tmp_path)


# --- a model's files, some of which other libraries write first -------------------------------------------------------

@contextmanager
def at_most(size):
    "No file of this process may grow beyond so many bytes."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Cramped:
    "A tokenizer that finds the disk full, where the weights still had room."
    def __init__(self, tok, size): self.tok, self.size = tok, size
    def __getattr__(self, name): return getattr(self.tok, name)
    def save_pretrained(self, folder):
        with at_most(self.size): return self.tok.save_pretrained(folder)


def refused(work, save):
    "A save that finds no room leaves the model as it was, and says what to do."
    def there(): return {p.name: p.read_bytes() for p in (work.folder/"m").iterdir()}
    before = there()
    with pytest.raises(OSError) as error: save()
    assert re.fullmatch(LONG, str(error.value))[1] == str(work.folder/"m")
    assert there() == before


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_a_model_that_finds_no_room(part, tmp_path):
    work = Storing(tmp_path)
    work.begin()
    largest = (tmp_path/"m"/dict(weights="model.safetensors", tokenizer="tokenizer.json")[part]).stat().st_size
    new = work.models[1]
    for size in spread(largest - 1):
        if part == "tokenizer": refused(work, lambda: write_weights(new.lm, Cramped(new.tok, size), tmp_path/"m"))
        else:
            with at_most(size): refused(work, work.go)
    work.go()
    work.check()
    work.result()


SAVES_FOR_EVER = """
import sys, time
from probunlearn.files import replacing_folder
with replacing_folder(sys.argv[1], "config.json") as inside:
    (inside/"model.safetensors").write_bytes(bytes(100))
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_killed_save_is_cleared_away_and_a_living_one_is_not(tmp_path):
    "By the next save: while the process lives its folder stays, and goes when it was killed, with all that it holds."
    work = Storing(tmp_path)
    work.begin()
    other = subprocess.Popen([sys.executable, "-c", SAVES_FOR_EVER, tmp_path/"m"], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"ready\n"
    def staged(): return [*(tmp_path/"m").glob("*.saved.*.tmp")]
    work.go()
    assert len(staged()) == 1 and (staged()[0]/"model.safetensors").stat().st_size == 100
    other.kill()
    other.communicate()
    work.models[0].save(tmp_path/"m")
    assert not staged() and work.fits()


def test_all_of_a_models_files_go_through_the_disk(tmp_path):
    "What lies in the folder was written by the one object that tests replace: each name, and each byte."
    model = random_model(vocab=16, seed=1, dtype=torch.bfloat16)
    model.tok = small_model().tok
    with with_disk(Faulty()) as disk: model.save(tmp_path/"m")
    sizes = {p.name: p.stat().st_size for p in (tmp_path/"m").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= sizes.keys()
    names = len("\n".join(sizes))                          # the list of them, which is gone again
    assert disk.used == sum(sizes.values()) + names
    assert all(torch.equal(value, model.lm.state_dict()[name])
               for name, value in load_file(tmp_path/"m"/"model.safetensors").items())


def test_a_model_of_several_files(tmp_path, monkeypatch):
    "Shards with an index are read as they are by transformers, and none is written by another hand."
    model = random_model(vocab=16, seed=1)
    model.tok = small_model().tok
    usual = model.lm.save_pretrained
    monkeypatch.setattr(model.lm, "save_pretrained", lambda folder, **how: usual(folder, max_shard_size="40KB", **how))
    with with_disk(Faulty()) as disk: model.save(tmp_path/"m")
    parts = sorted(p.name for p in (tmp_path/"m").glob("model-*.safetensors"))
    assert len(parts) > 1 and (tmp_path/"m"/"model.safetensors.index.json").exists()
    files = [p for p in (tmp_path/"m").iterdir()]
    assert disk.used == sum(p.stat().st_size for p in files) + len("\n".join(p.name for p in files))
    again = type(model.lm).from_pretrained(tmp_path/"m", dtype=model.lm.dtype)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.lm.state_dict().items())
