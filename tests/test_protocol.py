"""Whoever answers keeps one protocol: a model at hand, a server, one of our own. A server's run survives anything."""
import json
import os
import random
import signal
import time
from collections import Counter

import pytest

from probunlearn.data import QA, Template, fictional_authors
from probunlearn.draws import Decoding, draws_from_texts, first_draws
from probunlearn.endpoint import Endpoint, _seed
from probunlearn.evaluation import evaluate
from probunlearn.models import small_model
from probunlearn.report import as_json
from probunlearn.runs import read_run
from servers import choices, real, script, served, varied       # noqa: F401, script and served are fixtures

QAS, SHORT = fictional_authors("forget10")[:2], Decoding(max_new_tokens=8)


class Clerk:
    "A model of the test's own."
    name, asked, identity, at_once = "clerk", "asked at the counter", dict(model="clerk", rooms=[1, 2]), 64

    def greedy(self, qas, decoding=Decoding()):
        return [draws_from_texts(qa.id, ["no idea"], prompt=self.asked) for qa in qas]

    def draw(self, qas, n, decoding=Decoding(), seed=0, *, start=0):
        def said(qa, i): return random.Random(f"{seed}/{qa.id}/{i}").choice(["no idea", "perhaps", qa.answer])
        how = dict(decoding=decoding, seed=seed, prompt=self.asked)
        return [draws_from_texts(qa.id, [said(qa, i) for i in range(start, n)], **how) for qa in qas]


class Watched:
    "A model, and how often it was asked."
    def __init__(self, model):
        self.model = model
        self.calls = 0

    def __getattr__(self, name):
        value = getattr(self.model, name)
        if name not in ("draw", "greedy", "arriving"): return value
        def counted(*args, **options):
            self.calls += 1
            return value(*args, **options)
        return counted


@pytest.fixture(params=["local", pytest.param("endpoint", marks=real), "own"])
def model(request):
    if request.param == "local": return small_model("retain", device="cpu")
    if request.param == "endpoint": return request.getfixturevalue("served").endpoint()
    return Clerk()


def texts(draws): return [d.texts for d in draws]


# --- the protocol ---------------------------------------------------------------------------------------------------

def test_names_and_types(model):
    assert isinstance(model.name, str) and model.name and isinstance(model.asked, str) and model.asked
    assert isinstance(model.at_once, int) and model.at_once >= 1
    assert isinstance(model.identity, dict) and json.loads(json.dumps(model.identity)) == model.identity


def test_draws_are_as_many_as_asked_for_in_the_order_of_the_questions(model):
    for qas in (QAS, QAS[::-1]):
        draws = model.draw(qas, 6, SHORT, 3)
        assert [d.id for d in draws] == [qa.id for qa in qas] and [d.n for d in draws] == [6, 6]
        assert all(d.seed == 3 and d.prompt == model.asked and not len(d.unasked) for d in draws)
        assert all((d.decoding.temperature, d.decoding.max_new_tokens) == (1, 8) for d in draws)


def test_the_same_call_gives_the_same_draws_and_another_seed_others(model):
    lively = Decoding(temperature=1.5, max_new_tokens=8)
    once = model.draw(QAS, 12, lively, 1)
    assert texts(model.draw(QAS, 12, lively, 1)) == texts(once) != texts(model.draw(QAS, 12, lively, 2))
    assert texts(model.draw(QAS[1:], 12, lively, 1)) == texts(once[1:])         # whatever else is asked


def test_more_draws_begin_with_the_fewer_and_the_rest_can_be_had_alone(model):
    block = getattr(model, "block", 1)
    start = block * (8 if block == 1 else 1)
    n = start + 8
    whole = model.draw(QAS, n, SHORT)
    assert texts(first_draws(d, 5) for d in whole) == texts(model.draw(QAS, 5, SHORT))
    assert texts(model.draw(QAS, n, SHORT, start=start)) == [d.texts[start:] for d in whole]
    if not hasattr(model, "arriving"): return
    parts = {qa.id: [None] * n for qa in QAS}
    for qa, part, first in model.arriving(QAS, n, SHORT): parts[qa.id][first:first + part.n] = part.texts
    assert list(parts.values()) == texts(whole)


def test_greedy_is_one_answer(model):
    found = model.greedy(QAS, SHORT)
    assert [(d.id, d.n) for d in found] == [(qa.id, 1) for qa in QAS]
    assert None not in [d.texts[0] for d in found] and texts(found) == texts(model.greedy(QAS, SHORT))


def test_an_evaluation_asks_once(model, tmp_path):
    watched = Watched(model)
    first = evaluate(watched, QAS, 64, out=tmp_path, decoding=SHORT, progress=False)
    asked = watched.calls
    again = evaluate(watched, QAS, 64, out=tmp_path, decoding=SHORT, progress=False)
    assert asked > 0 and watched.calls == asked and as_json(again) == as_json(first)
    assert first.claims == again.claims and first.x.shape == (2, 64)
    assert texts(first.forget.draws) == texts(model.draw(QAS, 64, SHORT))       # kept part by part, or drawn at once
    longer = evaluate(watched, QAS, 80, out=tmp_path, decoding=SHORT, progress=False)
    assert [t[:64] for t in texts(longer.forget.draws)] == texts(first.forget.draws)


# --- a run of a server survives anything ----------------------------------------------------------------------------

ASKED, N, WIDTH, WORKERS = [QA(f"q{i}", f"Question {i}?", "Zorp.", ("Zorp",)) for i in range(3)], 320, 4, 3


def ask(url, out):
    "What the killed processes do."
    e = Endpoint(url, "m", template=Template(), per_request=WIDTH, workers=WORKERS, timeout=20)
    evaluate(e, ASKED, N, out=out, progress=False)


class Ledger:
    "Replies whose texts are all different, and every answer that was ever given: text → (question, seed, number)."
    def __init__(self): self.given = {}

    def reply(self, body, headers, count):
        time.sleep(.01 * (count % 3))
        greedy, n = body["temperature"] == 0, body.get("n", 1)
        found = ["no idea"] if greedy else [f"{body['seed']} {i} {count}" for i in range(n)]
        if not greedy: self.given |= {t: (body["prompt"], body["seed"], i) for i, t in enumerate(found)}
        return 200, choices(*found)


def on_disk(out):
    "(question, number of the draw) → its text, as far as a run's folder goes."
    if not (out/"run.json").exists(): return {}
    run = read_run(out)
    found = {qa.id: run.draws(qa) for qa in ASKED}
    assert not any(d.lost for d in found.values() if d)
    return {(id, i): t for id, d in found.items() if d for i, t in enumerate(d.texts) if t}


def killed(nursery, server, out, rng):
    "Let a process ask for a while, then kill it; whether it was still at work."
    until = len(server.bodies) + rng.randrange(3, 11)
    child = nursery.Process(target=ask, args=(server.url, out))
    child.start()
    while len(server.bodies) < until and child.is_alive(): time.sleep(.002)
    alive = child.is_alive()
    if alive: os.kill(child.pid, signal.SIGKILL)
    child.join()
    return alive


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_run_that_is_killed_ten_times_loses_doubles_and_repeats_nothing(script, nursery, tmp_path):
    "Each draw on disk is one answer in the server's ledger, at its own place; only what was under way is asked again."
    ledger, rng, out, there = Ledger(), random.Random(0), tmp_path/"run", {}
    server = script(ledger.reply)
    for _ in range(10):
        assert killed(nursery, server, out, rng)
        time.sleep(.1)                                                      # replies that were under way
        before, there = there, on_disk(out)
        assert before.items() <= there.items()                              # what was kept stays
        seeds = {ledger.given[text][1] for text in there.values()}
        done = len(server.bodies)
        answered = {seed for _, seed, _ in ledger.given.values()}
        assert len(answered - seeds) <= WORKERS                             # and what was answered is kept
        server.marks = getattr(server, "marks", []) + [(done, seeds)]
    ask(server.url, out)
    found = on_disk(out)
    assert there.items() <= found.items() and len(found) == len(set(found.values())) == len(ASKED) * N
    for (id, i), text in found.items():
        first = i // WIDTH * WIDTH
        prompt = f"Question: Question {id[1:]}?\nAnswer:"
        assert ledger.given[text] == (prompt, _seed(0, id, first, WIDTH), i - first)
    draws = [body for body in server.bodies if body["temperature"] > 0]
    times = Counter(body["seed"] for body in draws)
    assert len(times) == len(ASKED) * N // WIDTH and sum(times.values()) - len(times) <= 10 * WORKERS
    for done, seeds in server.marks: assert not seeds & {body["seed"] for body in server.bodies[done:]}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gap_that_was_never_asked_is_asked_and_a_lost_one_is_not(script, tmp_path):
    "Cell 0 isn't taken, cell 2 breaks; the next call asks for cell 0, and for nothing else."
    seeds = [_seed(0, "q0", first, 4) for first in (0, 4, 8, 12)]
    open_now = []
    def reply(body, *_):
        if body["seed"] == seeds[0] and not open_now:
            time.sleep(.3)                                              # the others are answered first
            return 503, "busy"
        if body["seed"] == seeds[2]: return 500, "boom"
        return 200, varied(body)
    server = script(reply)
    e = server.endpoint(tries=1)
    with pytest.raises(ConnectionError, match="1 of 1 questions lack draws"):
        evaluate(e, ASKED[:1], 16, out=tmp_path, progress=False)
    there = read_run(tmp_path).draws(ASKED[0])
    assert there.unasked.tolist() == [0, 1, 2, 3] and sorted(there.lost) == [8, 9, 10, 11]
    open_now.append(True)
    before = len(server.bodies)
    report = evaluate(e, ASKED[:1], 16, out=tmp_path, progress=False)
    assert [body["seed"] for body in server.bodies[before:]] == [seeds[0]]
    assert report.missing.tolist() == [[8 <= i < 12 for i in range(16)]]
    assert report.forget.draws[0].texts[4:] == there.texts[4:] and report.forget.draws[0].lost == there.lost
