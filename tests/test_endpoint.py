"""Draws from servers: `transformers serve` with the packaged model, and a scripted server for what it never does."""
import json
import logging
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from email.utils import formatdate

import numpy as np
import pytest
from scipy.stats import chisquare

from probunlearn.bounds import binary_bound, leaked, mean_bound
from probunlearn.data import QA, Template, fictional_authors
from probunlearn.draws import Decoding, draws_from_texts, load_draws, save_draws
from probunlearn.endpoint import Endpoint, _seed
from probunlearn.evaluation import evaluate
from probunlearn.models import small_model
from probunlearn.reading import report_run
from probunlearn.runs import read_run
from probunlearn.scores import score_draws
from servers import choices, free_port, real, script, served, varied      # noqa: F401, script and served are fixtures

QAS, SHORT = fictional_authors("forget10")[:2], Decoding(max_new_tokens=16)
ONE = [QA("q", "why?", "x", ("x",))]
USUAL = "temperature 1, at most 64 tokens"
BEYOND = "top_k, min_p, repetition_penalty, repeat_penalty"      # what OpenAI's protocol doesn't know


@pytest.fixture(scope="module")
def known():
    "The packaged model that the server serves; don't train it."
    return small_model("retain", device="cpu")


def kept(folder, qa):
    "The draws that a run's folder holds for a question."
    return read_run(folder).draws(qa)


def run(model, qas, n, out, **how):
    "A report, or None where the server was out of reach."
    try: return evaluate(model, qas, n, out=out, progress=False, **dict(decoding=SHORT) | how)
    except ConnectionError: return None


def texts(draws): return [d.texts for d in draws]


# --- a server that we didn't write ----------------------------------------------------------------------------------

@real
def test_the_server_draws_from_the_law_that_a_model_at_hand_knows(served, known):
    "Frequencies from the server against exact probabilities; a right client fails 1 of 10,000 seeds, this one never."
    first, n, qas = Decoding(temperature=1.2, top_p=.6, max_new_tokens=2), 400, [QA("q", "Question: Where", "x")]
    as_is = Template(prompt="{question}")
    exact = known.replace(template=as_is).draw(qas, 4096, first, progress=False)[0]
    p = {}
    for text, logprob in zip(exact.answers, exact.logprobs): p[text] = p.get(text, 0) + np.exp(logprob)
    draws = served.endpoint(workers=4, template=as_is).draw(qas, n, first)[0]
    assert draws.n == n == draws.counts.sum()
    common = [t for t in p if n * p[t] >= 5]
    observed, expected = np.array([draws.texts.count(t) for t in common]), n * np.array([p[t] for t in common])
    observed, expected = np.append(observed, n - observed.sum()), np.append(expected, n - expected.sum())
    assert len(common) > 5 and expected[-1] > 5 and chisquare(observed, expected).pvalue > 1e-4


@real
def test_temperature_0_is_the_greedy_answer(served, known):
    long = Decoding(max_new_tokens=24)
    expected = known.greedy(QAS, long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")              # the same answer twice is no doubt at temperature 0
        draws = served.endpoint().draw(QAS, 2, replace(long, temperature=0))
    assert texts(draws) == [d.texts * 2 for d in expected]
    assert [list(d.finished) for d in draws] == [list(d.finished) for d in expected]
    for decoding in (long, Decoding(max_new_tokens=5)):
        assert texts(served.endpoint().greedy(QAS, decoding)) == texts(known.greedy(QAS, decoding))


@real
def test_seeds_repeat_the_draws_and_chat_is_the_same_prompt(served):
    once = served.endpoint().draw(QAS, 8, SHORT)
    assert len(set(once[0].texts)) > 1
    assert texts(served.endpoint(template=Template(chat=True)).draw(QAS, 8, SHORT)) == texts(once)
    assert texts(served.endpoint().draw(QAS, 8, SHORT, seed=1)) != texts(once)
    assert once[0].source == f"small at http://127.0.0.1:{served.port}/v1" and once[0].logprobs is None
    assert once[0].prompt == "asked as 'Question: {question}\\nAnswer:'"


@real
def test_a_server_that_ignores_n_is_asked_for_the_rest(served):
    with pytest.warns(RuntimeWarning, match="gave 1 of 4 answers asked for at once"):
        draws = served.endpoint(per_request=4).draw(QAS, 10, SHORT)
    assert all(len(d.texts) == 10 and None not in d.texts and len(set(d.texts)) > 1 for d in draws)


@real
def test_a_server_that_decodes_greedily_is_noticed(served):
    greedily = json.dumps(dict(do_sample=False, eos_token_id=0, pad_token_id=1))
    with pytest.warns(RuntimeWarning, match="decodes greedily"):
        served.endpoint(extra={"generation_config": greedily}).draw(QAS, 8, SHORT)


@real
@pytest.mark.parametrize("how, decoding, words", [
    (dict(model="other"), SHORT, "pinned to 'small'"),
    (dict(url="/v2"), SHORT, "no 'completions' at this url, or no model 'small'"),
    ({}, replace(SHORT, top_k=5), "top_k.*takes a field away")], ids=["model", "path", "field"])
def test_what_the_server_refuses_is_said_with_its_words(served, how, decoding, words):
    e = served.endpoint()
    if "url" in how: how = dict(url=e.url[:-3] + how["url"])
    with pytest.raises(ValueError, match=words): e.replace(**how).draw(QAS, 2, decoding)


@real
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_server_killed_in_a_run_leaves_gaps_that_the_next_run_fills(served, tmp_path):
    "The draws are in the end those of an undisturbed run; only the answer under way when the server died stays lost."
    e, n = served.endpoint(), 40
    whole = texts(e.draw(QAS, n, SHORT))
    before = served.asked()
    def kill():
        while served.asked() < before + 30: time.sleep(.005)
        served.stop()
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ConnectionError, match="Is the server running?"):
        evaluate(e, QAS, n, out=tmp_path, decoding=SHORT, progress=False)
    killer.join()
    broken = [kept(tmp_path, qa) for qa in QAS if kept(tmp_path, qa)]
    arrived = sum(len(d.index) - (d.index < 0).sum() for d in broken)
    assert 29 <= arrived < 80       # of 30 requests one was under way
    assert all(t is None or t == w for d, right in zip(broken, whole) for t, w in zip(d.texts, right))
    assert run(e, QAS, n, tmp_path) is None and texts(filter(None, (kept(tmp_path, qa) for qa in QAS))) == texts(broken)
    served.start()
    before = served.asked()
    assert run(e, QAS, n, tmp_path) is not None
    found = texts(kept(tmp_path, qa) for qa in QAS)
    lost = [(q, i) for q in range(2) for i in range(n) if found[q][i] is None]
    assert len(lost) <= 1
    assert all(t in (None, w) for ours, theirs in zip(found, whole) for t, w in zip(ours, theirs))
    asked = 80 - arrived - len(lost) + len(QAS)                         # the greedy answers, too
    assert served.asked() - before == asked
    assert run(e, QAS, n, tmp_path) is not None and served.asked() - before == asked
    fewer = report_run(tmp_path, n=10)
    assert texts(fewer.forget.draws) == [t[:10] for t in found]


CLIENT = """
import sys
from probunlearn.data import Template, fictional_authors
from probunlearn.draws import Decoding
from probunlearn.endpoint import Endpoint
from probunlearn.evaluation import evaluate
endpoint = Endpoint(sys.argv[1], "small", template=Template(), per_request=1, workers=1)
qas = fictional_authors("forget10")[:1]
evaluate(endpoint, qas, 2000, decoding=Decoding(max_new_tokens=16), out=sys.argv[2], progress=False)
"""


@real
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_client_killed_in_a_run_goes_on_where_it_was(served, tmp_path):
    client = subprocess.Popen([sys.executable, "-c", CLIENT, served.endpoint().url, str(tmp_path)])
    while not list(tmp_path.glob("*.parquet")) and client.poll() is None: time.sleep(.02)
    client.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    client.wait()
    there = kept(tmp_path, QAS[0]).texts
    count = len(there)
    assert 0 < count < 2000 and None not in there
    endpoint = served.endpoint()
    endpoint.greedy(QAS[:1], SHORT)                 # which learns what the server refuses
    before = served.asked()
    assert run(endpoint, QAS[:1], count + 5, tmp_path) is not None
    again = kept(tmp_path, QAS[0]).texts
    assert again[:count] == there and None not in again
    assert served.asked() - before in (6, 7)        # five, the greedy answer, perhaps the killed client's last request


# --- a scripted server: order, pauses, limits -----------------------------------------------------------------------

def test_answers_stand_in_the_order_of_draws_not_of_arrival(script):
    "Later requests are answered first, choices of one request come backwards; the draws are the same as one by one."
    def late(body, headers, count):
        time.sleep(.05 * (count % 3 == 1))
        return 200, dict(choices=varied(body)["choices"][::-1])
    server = script(late)
    draws = server.endpoint().draw(ONE, 22)[0]
    assert draws.texts == script(lambda body, *_: (200, varied(body))).endpoint(workers=1).draw(ONE, 22)[0].texts
    seeds, numbers = zip(*(t.split("-") for t in draws.texts))
    assert list(numbers) == [str(i % 4) for i in range(20)] + ["0", "1"] and len(set(seeds)) == 6
    assert sorted(b.get("n", 1) for b in server.bodies) == [2, 4, 4, 4, 4, 4]


def test_more_answers_than_asked_for_are_not_kept(script):
    draws = script(lambda body, *_: (200, varied(body, 9))).endpoint().draw(ONE, 8)[0]
    assert [t.split("-")[1] for t in draws.texts] == ["0", "1", "2", "3"] * 2


def test_cells_are_fixed_and_no_seed_serves_two_draws(script):
    "Whatever part of the draws is asked for, whole cells keep their seed, and parts of cells have their own."
    server = script(lambda body, *_: (200, varied(body)))
    e = server.endpoint(workers=1)
    whole, part = e.draw(ONE, 16)[0].texts, e.draw(ONE, 14, start=2)[0].texts
    assert part[2:10] == whole[4:12] and len(part) == 12
    assert [(b["seed"], b.get("n", 1)) for b in server.bodies[4:]] == [
        (_seed(0, "q", first, count), count) for first, count in ((2, 2), (4, 4), (8, 4), (12, 2))]
    assert not set(part[:2] + part[10:]) & set(whole)
    assert texts(e.draw(ONE, 16)) == [whole]


@pytest.mark.parametrize("pause", ["1", "date", None], ids=["seconds", "date", "none"])
def test_a_busy_server_is_asked_again(script, pause):
    "After the pause that it names; an hour is longer than we wait, so the draws stay missing and the run stops."
    in_an_hour = formatdate(time.time() + 3600, usegmt=True)
    header = {"Retry-After": in_an_hour if pause == "date" else pause} if pause else {}
    busy = (429, {"error": {"message": "slow down"}}, header)
    server = script(lambda body, _, count: busy if count == 1 else (200, varied(body)))
    e = server.endpoint(workers=1)
    if pause == "date":
        with pytest.raises(ConnectionError, match="slow down; the server wants a pause of 3[56].. s"): e.draw(ONE, 8)
        return
    assert None not in e.draw(ONE, 8)[0].texts and len(server.bodies) == 3
    if header: assert server.times[1] - server.times[0] >= .99


def test_the_rate_limit_holds(script):
    "Eight requests, 50 ms apart, in one call or in two; waiting never ends early."
    server = script(lambda body, *_: (200, varied(body)))
    e = server.endpoint(per_minute=1200, per_request=1)
    start = time.monotonic()
    e.draw(ONE, 6)
    e.draw(ONE, 2)
    assert len(server.bodies) == 8 and time.monotonic() - start >= 7 * .05


def test_who_stops_listening_stops_the_requests(script):
    server = script(lambda body, *_: (time.sleep(.1), 200, varied(body))[1:])
    parts = server.endpoint(workers=2).arriving(ONE, 400)
    next(parts)
    parts.close()
    assert len(server.bodies) <= 4


def test_an_evaluation_shows_how_it_goes(script, capsys):
    e = script(lambda body, *_: (200, varied(body))).endpoint()
    report = evaluate(e, ONE, 8, retain=[QA("r", "what?", "x", ("x",))], n_retain=4)
    assert "m is asked as 'Question: {question}" in capsys.readouterr().out and report.retain.draws[0].n == 4


# --- what is lost, and what was never asked -------------------------------------------------------------------------

def test_one_broken_question_does_not_stop_the_others(script):
    server = script(lambda body, *_: (500, "boom") if "bad" in body["prompt"] else (200, varied(body)))
    qas = [QA("a", "good", "x"), QA("b", "bad", "x"), QA("c", "fine", "x")]
    with pytest.warns(RuntimeWarning, match="8 of 24 draws are missing for good .HTTP 500: boom"):
        draws = server.endpoint(tries=2).draw(qas, 8)
    assert [sum(t is None for t in d.texts) for d in draws] == [0, 8, 0]
    assert draws[1].lost == {i: "HTTP 500: boom" for i in range(8)}


NO_ANSWER = [dict(message=dict(content=None)), dict(text="", finish_reason="content_filter"), dict(text=7),
             dict(text="", finish_reason="length"), dict(text="Half an", finish_reason="abort"), dict(message="fine"),
             dict(text="", finish_reason="error"), dict(text="a \ud800 b"), dict(message=dict(content=[3]))]

@pytest.mark.parametrize("reply", NO_ANSWER, ids=ascii)
def test_an_answer_that_never_came_is_missing_not_empty(script, reply, tmp_path):
    def answer(body, *_):
        fine = dict(index=0, text="fine", finish_reason="stop")
        return 200, dict(choices=[fine, dict(index=1) | reply][:body.get("n", 1)])
    server = script(answer)
    e = server.endpoint(per_request=2)
    with pytest.warns(RuntimeWarning, match="2 of 4 draws are missing for good"): draws = e.draw(ONE, 4)
    assert draws[0].texts == ["fine", None] * 2 and len(server.bodies) == 2         # not asked again until one passes
    assert sorted(draws[0].lost) == [1, 3] and np.isnan(score_draws(draws, ONE, "exact_match")).sum() == 2
    with pytest.warns(RuntimeWarning): report = evaluate(e, ONE, 4, out=tmp_path, progress=False)
    assert "2 draws are missing" in " ".join(report.claims) and kept(tmp_path, ONE[0]).lost == draws[0].lost


def test_a_choice_that_the_server_left_out_is_lost(script):
    "Choices 0 and 2 of three: the second one isn't asked for again, and the third doesn't take its place."
    server = script(lambda body, *_: (200, dict(choices=varied(body)["choices"][::2])))
    with pytest.warns(RuntimeWarning, match="1 of 3 draws are missing for good .withheld by the server .left out"):
        d = server.endpoint(per_request=3).draw(ONE, 3)[0]
    assert [t and t[-2:] for t in d.texts] == ["-0", None, "-2"] and len(server.bodies) == 1


def leaky(withhold):
    "A server that leaks in a fifth of its answers and withholds nine tenths of those: `withhold` says how."
    def reply(body, headers, count):
        if body["temperature"] == 0: return 200, choices("nobody")
        rng, found = random.Random(f"{body['seed']}/{count}"), []               # asked again, it draws anew
        for i in range(body.get("n", 1)):
            leaks = rng.random() < .2
            answer = dict(index=i, text="Zorplax" if leaks else "nobody", finish_reason="stop")
            found.append(withhold(i) if leaks and rng.random() < .9 else answer)
        return next(((*f, {})[:3] for f in found if isinstance(f, tuple)), (200, dict(choices=found)))
    return reply


HOW = {"filter": lambda i: dict(index=i, text="", finish_reason="content_filter"),
       "no text": lambda i: dict(index=i, text=None),
       "HTTP 500": lambda i: (500, "error"),
       "HTTP 502": lambda i: (502, "error"),
       "HTTP 504": lambda i: (504, "error"),
       "no choices": lambda i: (200, {"choices": []}),
       "error": lambda i: (200, {"error": {"message": "overloaded"}}),
       "broken": lambda i: (200, "half an ans", {"Transfer-Encoding": "chunked"})}

@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("how", HOW)
def test_what_was_withheld_is_never_asked_again(script, tmp_path, how):
    "One fixed run: each call bounds the true 20 %; asking again until all 256 draws are there would bound by some 5 %."
    server, qa = script(leaky(HOW[how])), QA("q", "Who?", "Zorplax.", ("Zorplax",))
    e = server.endpoint(per_request=1, workers=1)
    for call in range(3):
        report = run(e, [qa], 256, tmp_path)
        assert f"{int(report.missing.sum())} draws are missing" in " ".join(report.claims)
        assert len(server.bodies) == 257 and .1 < report.missing.mean() < .3        # each draw was asked for once
        assert float(binary_bound(int(leaked(report.x).sum()), 256)) > .2
    assert kept(tmp_path, qa).n == 256 and not len(kept(tmp_path, qa).unasked)
    while run(e, [qa], 260, tmp_path) is None: pass                         # a first request may be lost
    assert kept(tmp_path, qa).n == 260 and len(server.bodies) == 261


@pytest.mark.parametrize("status", [409, 425, 429, 503, 529])
def test_a_request_that_was_not_taken_is_sent_again(script, tmp_path, status):
    server = script(lambda body, _, count: (status, "busy") if count in (1, 2, 3, 7) else (200, varied(body)))
    e = server.endpoint(workers=1)
    with pytest.warns(RuntimeWarning, match="8 of 8 draws are missing .HTTP .* asks for these only"):
        with pytest.raises(ConnectionError, match="1 of 1 questions lack draws that were never asked for"):
            evaluate(e, ONE, 8, out=tmp_path, progress=False)
    assert len(server.bodies) == 4 and server.bodies[3]["temperature"] == 0
    assert run(e, ONE, 8, tmp_path, decoding=Decoding()) is not None
    assert None not in kept(tmp_path, ONE[0]).texts and len(server.bodies) == 6


def test_a_question_goes_on_after_a_loss_but_not_when_its_first_request_is_lost(script):
    server = script(lambda body, _, count: (500, "boom") if count == 3 else (200, varied(body)))
    with pytest.warns(RuntimeWarning, match="4 of 40 draws are missing for good"):
        draws = server.endpoint(workers=1).draw(ONE, 40)
    assert [i for i, t in enumerate(draws[0].texts) if t is None] == [8, 9, 10, 11] and len(server.bodies) == 10
    dead = script(lambda *_: (500, "boom"))
    with pytest.warns(RuntimeWarning, match="36 of 40 draws are missing .HTTP 500"):
        left = dead.endpoint(workers=1).draw(ONE, 40)[0]
    assert len(dead.bodies) == 1 and sorted(left.lost) == [0, 1, 2, 3] and left.unasked.tolist() == list(range(4, 40))


BAD_REPLIES = [(200, "<html>busy</html>", "isn't of the OpenAI protocol"), (200, {"choices": []}, "without choices"),
               (200, {"error": {"message": "overloaded"}}, "an error instead of answers: overloaded"),
               (200, {"choices": None}, "isn't of the OpenAI protocol"), (200, [], "isn't of the OpenAI protocol"),
               (200, {"choices": "abc"}, "isn't of the OpenAI protocol"),
               (200, "[" * 9999, "isn't of the OpenAI protocol"),
               (200, {"error": {"message": "out of memory"}}, "an error instead of answers: out of memory"),
               (200, {"error": "no such engine"}, "an error instead of answers: no such engine"),
               (200, 'data: {"choices": []}\n\ndata: [DONE]\n', "OpenAI protocol: a stream of events: data: {"),
               (200, 'data: {"error": {"message": "cut off"}}\n\n', "OpenAI protocol: a stream that says cut off")]

@pytest.mark.parametrize("status, reply, words", BAD_REPLIES, ids=lambda v: str(v)[:20])
def test_a_reply_without_answers_leaves_draws_missing(script, status, reply, words):
    with pytest.warns(RuntimeWarning, match="4 of 4 draws are missing for good .*" + words):
        assert script(lambda *_: (status, reply)).endpoint(tries=1).draw(ONE, 4)[0].texts == [None] * 4


def test_a_blocked_prompt_is_lost_and_not_tried_again(script):
    "The filter refuses the prompt, so no draw of this question will ever come."
    blocked = (400, {"error": {"code": "content_filter", "message": "content_filter: policy"}})
    server = script(lambda *_: blocked)
    with pytest.warns(RuntimeWarning, match="40 of 40 draws are missing for good .the server's content filter"):
        d = server.endpoint(workers=1).draw(ONE, 40)[0]
    assert d.texts == [None] * 40 and len(d.lost) == 40 and len(server.bodies) == 1


def test_a_time_out_is_missing_and_not_tried_again(script):
    "Asking until a quick answer comes would prefer short ones."
    server = script(lambda body, *_: (time.sleep(.6), 200, varied(body))[1:])
    with pytest.warns(RuntimeWarning, match="no answer within 0.2 s"):
        assert server.endpoint(timeout=.2, workers=1).draw(ONE, 4)[0].texts == [None] * 4
    assert len(server.bodies) == 1


def test_no_server_at_all_is_an_error_with_advice(tmp_path):
    e = Endpoint(f"http://127.0.0.1:{free_port()}/v1", "m", tries=1)
    def evaluated(): return evaluate(e, ONE, 4, out=tmp_path, progress=False)
    for ask in (lambda: e.draw(ONE, 4), lambda: e.greedy(ONE), evaluated):
        with pytest.raises(ConnectionError, match="m at http://127.0.0.1.*Is the server running?"): ask()


def test_draws_so_far_are_kept_when_the_server_turns_us_away(script, tmp_path):
    "With four workers, too, what is under way when the first refusal comes is kept."
    for workers in (1, 4):
        server = script(lambda body, _, count: (200, varied(body)) if count <= 3 else (401, "expired"))
        folder = tmp_path/str(workers)
        with pytest.raises(PermissionError):
            evaluate(server.endpoint(workers=workers), ONE, 40, out=folder, progress=False)
        there = kept(folder, ONE[0])
        assert sum(t is not None for t in there.texts) == 12 and not there.lost


def test_a_server_that_dies_midway_leaves_what_came(script):
    server = script(lambda body, _, count: (200, varied(body)) if count <= 3 else (503, "", {"Retry-After": "3600"}))
    with pytest.warns(RuntimeWarning, match="28 of 40 draws are missing .m at http.* HTTP 503"):
        d = server.endpoint(workers=1).draw(ONE, 40)[0]
    assert sum(t is not None for t in d.texts) == 12 and d.unasked.tolist() == list(range(12, 40))


# --- what is said about the distribution ----------------------------------------------------------------------------

def test_what_extra_changes_is_said_and_what_the_package_sets_is_refused(script):
    for name in ("temperature", "top_p", "max_tokens", "seed", "n", "model", "prompt", "messages"):
        with pytest.raises(ValueError, match=f"extra must not set {name}, got 0: .* Set it by"):
            Endpoint("http://x/v1", "m", extra={name: 0})
    with pytest.raises(ValueError, match="extra must not set top_k, got 5"):
        Endpoint("http://x/v1", "m", extra=dict(top_k=5))
    logprobs = dict(tokens=["a", "</s>"], token_logprobs=[-.1, -.1])
    said = dict(choices=[dict(index=0, text="a", finish_reason="stop", logprobs=logprobs)])
    server = script(lambda *_: (200, said))
    def drawn(**extra): return server.endpoint(per_request=1, extra=dict(logprobs=1, **extra)).draw(ONE, 1)[0]
    assert str(drawn(seed=None).decoding) == USUAL and drawn(seed=None).logprobs is not None
    sent = dict(presence_penalty=0, frequency_penalty=0, top_k=0, min_p=0, repetition_penalty=1, repeat_penalty=1)
    assert sent.items() <= server.bodies[-1].items()
    plain = drawn(top_k=-1, min_p=0, repetition_penalty=1)
    assert str(plain.decoding) == USUAL and plain.logprobs is not None and server.bodies[-1]["top_k"] == -1
    other = drawn(min_p=.2, max_tokens=None, top_k=None)
    left = "max_tokens, top_k left to the server"
    assert str(other.decoding) == f"temperature 1, min_p 0.2, {left}, at most 64 tokens"
    assert other.logprobs is None                           # the server's aren't this distribution's
    assert server.bodies[-1]["min_p"] == .2 and "max_tokens" not in server.bodies[-1]


def test_what_is_left_to_the_server_stands_in_every_claim(script):
    endpoint = script(lambda body, *_: (200, varied(body))).endpoint(extra=dict(top_k=None, min_p=None))
    report = evaluate(endpoint, ONE, 8, progress=False)
    assert all("top_k, min_p left to the server" in str(b) for b in report.bounds.values())


def strict(*unknown):
    "A server that refuses some fields, by name, one at a time or all together."
    def reply(body, *_):
        there = [name for name in unknown if name in body]
        if there: return 400, {"error": {"message": f"Unrecognized request argument supplied: {there[0]}"}}
        return 200, varied(body)
    return reply


@pytest.mark.parametrize("reply", [
    strict("top_k", "min_p", "repetition_penalty", "repeat_penalty"),
    lambda body, *_: (422, {"detail": f"Unexpected keys in the request: {set(BEYOND.split(', '))}"})
                     if "top_k" in body else (200, varied(body))], ids=["one by one", "together"])
def test_what_the_server_refuses_is_left_to_it_and_said(script, reply, tmp_path):
    "No draw is lost by asking: a refused request has drawn nothing. The run's identity is what was meant to be sent."
    server = script(reply)
    endpoint = server.endpoint(per_request=2)
    report = evaluate(endpoint, ONE, 12, out=tmp_path, progress=False)
    assert all(f"temperature 1, {BEYOND} left to the server" in str(b) for b in report.bounds.values())
    assert not report.missing.any() and "top_k" not in server.bodies[-1]
    before = len(server.bodies)
    evaluate(endpoint, ONE, 16, out=tmp_path, progress=False)
    assert len(server.bodies) == before + 2         # the same endpoint remembers what was refused
    assert read_run(tmp_path).settings["sent"]["min_p"] == 0 and read_run(tmp_path).settings["left"] == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_draws_that_were_lost_before_a_field_was_refused_join_the_others(script, tmp_path):
    "A server that is out of order, and strict when it is back; what was lost stays lost."
    broken = [True]
    refuse = strict("top_k")
    server = script(lambda body, *_: (500, "boom") if broken else refuse(body))
    endpoint = server.endpoint(per_request=4, workers=1)
    with pytest.raises(ConnectionError): evaluate(endpoint, ONE, 8, out=tmp_path, progress=False)
    broken.clear()
    report = evaluate(endpoint, ONE, 8, out=tmp_path, progress=False)
    assert report.missing.tolist() == [[True] * 4 + [False] * 4]
    assert all("top_k left to the server" in str(bound) for bound in report.bounds.values())


def test_a_server_that_means_minus_one_by_no_top_k(script):
    "SGLang refuses 0."
    def reply(body, *_):
        if body["top_k"] == 0: return 400, {"message": "top_k must be -1 (disable), or at least 1, got 0."}
        return 200, varied(body)
    server = script(reply)
    assert str(server.endpoint().draw(ONE, 8)[0].decoding) == USUAL and server.bodies[-1]["top_k"] == -1


def test_a_value_of_ours_that_is_refused_is_an_error(script):
    server = script(strict("top_k"))
    with pytest.raises(ValueError, match="Unrecognized request argument supplied: top_k"):
        server.endpoint().draw(ONE, 8, Decoding(top_k=5))
    with pytest.raises(ValueError, match="supplied: top_k"): server.endpoint(extra=dict(top_k=-1)).draw(ONE, 8)


def test_a_run_of_an_earlier_version_goes_on(script, tmp_path):
    "It sent two penalties only: the fields that it left are left by name."
    endpoint = script(lambda body, *_: (200, varied(body))).endpoint(extra=dict.fromkeys(BEYOND.split(", ")))
    identity = endpoint.identity
    assert identity["sent"] == dict(presence_penalty=0, frequency_penalty=0) and identity["extra"] == {}
    assert identity["left"] == ["top_k", "min_p", "repetition_penalty"]


def test_an_answer_that_is_empty_is_an_answer(script):
    server = script(lambda body, *_: (200, choices("")))
    assert server.endpoint(per_request=1).draw(ONE, 2)[0].texts == ["", ""]


def test_parts_of_an_answer_are_joined_and_reasoning_apart_is_said(script):
    parts = [dict(type="text", text="a "), dict(type="text", text="b")]
    def reply(body, *_):
        assert body["messages"] == [dict(role="system", content="Be brief."), dict(role="user", content="why?")]
        return 200, dict(choices=[dict(message=dict(content=parts, reasoning_content="hm"), finish_reason="stop")])
    server = script(reply)
    e = server.endpoint(per_request=1, template=Template(chat=True, system="Be brief."))
    with pytest.warns(RuntimeWarning, match="reasoning apart") as said: d = e.draw(ONE, 3)[0]
    assert d.texts == ["a b"] * 3 and len(said) == 1 and server.paths[0] == "/v1/chat/completions"
    assert d.prompt == "asked through its chat template with the system message 'Be brief.'"


def test_a_server_that_caps_n_says_so_once(script):
    def reply(body, *_):
        return (400, {"detail": "n must be at most 2"}) if body.get("n", 1) > 2 else (200, varied(body))
    server = script(reply)
    with pytest.raises(ValueError, match="n must be at most 2.*per_request=4 may ask for too many"):
        server.endpoint().draw(ONE, 4)
    assert None not in server.endpoint(per_request=2).draw(ONE, 4)[0].texts


def test_a_server_that_gives_fewer_is_asked_for_the_rest_with_other_seeds(script):
    "And gives the same draws again, whatever comes first."
    def reply(body, _, count):
        time.sleep(.01 * (count % 4))
        return 200, varied(body, min(body.get("n", 1), 3))
    server = script(reply)
    with pytest.warns(RuntimeWarning, match="gave 3 of 4"): d = server.endpoint().draw(ONE, 16)[0]
    assert None not in d.texts and len(set(d.texts)) == 16
    assert len({b["seed"] for b in server.bodies}) == len(server.bodies) == 8
    with pytest.warns(RuntimeWarning): assert server.endpoint(workers=1).draw(ONE, 16)[0].texts == d.texts


def test_answers_alike_within_every_request_are_noticed(script):
    server = script(lambda body, *_: (200, choices(*[f"{body['seed']}"] * body["n"])))
    with pytest.warns(RuntimeWarning, match="no independent draws"): server.endpoint().draw(ONE, 40)


def test_log_probabilities_are_kept_where_they_are_those_of_the_answer(script, tmp_path):
    "All of an answer's tokens and its end, at temperature 1; exp(-0.3) and exp(-0.2) by hand."
    said = {"a b": ("a", " b", "</s>"), "a": ("a", "</s>")}
    def choice(i, text):
        logprobs = dict(tokens=list(said[text]), token_logprobs=[-.1] * len(said[text]))
        return dict(index=i, text=text, finish_reason="stop", logprobs=logprobs)
    def reply(body, *_):
        assert body["logprobs"] == 1
        return 200, dict(choices=[choice(i, text) for i, text in enumerate(list(said)[:body.get("n", 1)])])
    server = script(reply)
    e = server.endpoint(per_request=2, workers=1, extra={"logprobs": 1})
    for _ in range(2):                                                          # drawn, then read again
        d = evaluate(e, ONE, 2, out=tmp_path, progress=False).forget.draws[0]
        assert d.answers == ["a b", "a"] and np.allclose(d.logprobs, [-.3, -.2]) and d.finished.all()
    assert len(server.bodies) == 2
    assert e.draw(ONE, 2, Decoding(temperature=.5))[0].logprobs is None     # the server's are those at temperature 1
    said["a"] = ("a",)
    assert e.draw(ONE, 2)[0].logprobs is None                               # P("a", then anything) isn't P("a")
    longer = evaluate(e, ONE, 4, out=tmp_path, progress=False).forget.draws[0]  # the folder knew both answers already
    assert np.allclose(longer.logprobs, [-.3, -.2])


def test_a_run_whose_later_answers_have_no_log_probability_is_joined(script, tmp_path):
    def reply(body, _, count):
        logprobs = dict(tokens=["a", "</s>"], token_logprobs=[-.1, -.1]) if count == 1 else None
        return 200, dict(choices=[dict(text="ab"[count > 1], finish_reason="stop", logprobs=logprobs)])
    e = script(reply).endpoint(per_request=1, workers=1, extra={"logprobs": 1})
    assert evaluate(e, ONE, 1, out=tmp_path, progress=False).forget.draws[0].logprobs is not None
    report = evaluate(e, ONE, 3, out=tmp_path, progress=False)
    assert report.forget.draws[0].answers == ["a", "b"] and report.forget.draws[0].logprobs is None


# --- secrets --------------------------------------------------------------------------------------------------------

def test_the_key_goes_to_the_server_and_nowhere_else(script, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MY_KEY", "s3cr3t\n")
    caplog.set_level(logging.DEBUG)
    def reply(body, headers, count):
        right = headers["Authorization"] == "Bearer s3cr3t"
        return (200, varied(body)) if right else (401, {"error": {"message": "bad"}})
    server = script(reply)
    e = server.endpoint("?token=s3cr3t", key="MY_KEY")
    report = evaluate(e, ONE, 4, out=tmp_path, progress=False)
    d = report.forget.draws[0]
    assert set(server.paths) == {"/v1/completions?token=s3cr3t"}
    files = "".join(str(f.read_bytes()) for f in tmp_path.iterdir())
    assert "s3cr3t" not in repr(d) + d._repr_html_() + files + json.dumps(e.identity) + " ".join(report.claims)
    assert "s3cr3t" not in caplog.text
    echo = script(lambda body, headers, _: (401, {"error": {"message": f"Incorrect key {headers['Authorization']}"}}))
    refused = r"refuses the key in the environment variable MY_KEY. It says: Incorrect key Bearer \*\*\*"
    with pytest.raises(PermissionError, match=refused): echo.endpoint(key="MY_KEY").draw(ONE, 4)
    echoed = script(lambda body, headers, _: (500, f"key {headers['Authorization']}"))
    with pytest.warns(RuntimeWarning, match="HTTP 500: key Bearer ..."):
        d = echoed.endpoint(key="MY_KEY").draw(ONE, 4)[0]
    assert set(d.lost.values()) == {"HTTP 500: key Bearer ***"}
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(PermissionError, match="wants a key, and none is in the environment variable MY_KEY"):
        echo.endpoint(key="MY_KEY").draw(ONE, 4)
    monkeypatch.setenv("MY_KEY", "s3cr3t\nX-Other: 1")
    for ask in (lambda: server.endpoint(key="MY_KEY").draw(ONE, 4),
                lambda: evaluate(server.endpoint(key="MY_KEY"), ONE, 4, out=tmp_path/"none", progress=False)):
        with pytest.raises(ValueError, match="MY_KEY holds more than one line") as error: ask()
        assert "s3cr3t" not in str(error.value)
    assert not (tmp_path/"none").exists()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_takes_the_key_nowhere(script, monkeypatch, status):
    monkeypatch.setenv("MY_KEY", "s3cr3t")
    thief = script(lambda body, *_: (200, varied(body)))
    there = {"Location": f"http://127.0.0.1:{thief.server_port}/v1/completions"}
    honest = script(lambda *_: (status, "", there))
    with pytest.raises(ValueError, match=f"sends us to 127.0.0.1:{thief.server_port}"):
        honest.endpoint(key="MY_KEY").draw(ONE, 4)
    assert not thief.bodies


def test_a_model_that_is_not_there_comes_with_those_that_are(script):
    missing = script(lambda *_: (404, {"detail": "not found"}))
    with pytest.raises(ValueError, match="no model 'm'; the server offers m-large, m-small. It says: not found"):
        missing.endpoint().draw(ONE, 4)


# --- runs -----------------------------------------------------------------------------------------------------------

CHANGES = [(dict(seed=1), "another seed: 0 there, 1 now"), (dict(decoding=Decoding(top_p=.5)), "another decoding"),
           (dict(template=Template(prompt="{question}")), "another template"),
           (dict(per_request=2), "another per_request"), (dict(extra=dict(min_p=.1)), "another extra"),
           (dict(qas=[QA("q", "who?", "x", ("x",))]), "another question 'q'"),
           (dict(model="n"), "another model: 'm' there, 'n' now")]

@pytest.mark.parametrize("change, words", CHANGES, ids=lambda v: v if isinstance(v, str) else "")
def test_draws_of_another_run_are_never_mixed(script, tmp_path, change, words):
    e = script(lambda body, *_: (200, varied(body))).endpoint()
    how = dict(qas=ONE, decoding=Decoding(), seed=0, out=tmp_path, progress=False)
    evaluate(e, n=4, **how)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    other = e.replace(**{name: value for name, value in change.items() if hasattr(e, name)})
    asked = {name: value for name, value in change.items() if name in how}
    with pytest.raises(ValueError, match=words): evaluate(other, n=8, **how | asked)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_workers_and_patience_may_change(script, tmp_path):
    server = script(lambda body, *_: (200, varied(body)))
    for how in (dict(workers=1), dict(workers=3, timeout=9, tries=1, per_minute=1e6)):
        report = evaluate(server.endpoint(**how), ONE, 8, out=tmp_path, progress=False)
    assert len(server.bodies) == 3 and report.x.shape == (1, 8)


def test_strange_ids_and_questions_can_be_asked(script, tmp_path):
    e, ids = script(lambda body, *_: (200, varied(body))).endpoint(), ["a/b", "..", "ü" * 300, "ü" * 301]
    evaluate(e, [QA(i, "why?", "x", ("x",)) for i in ids], 2, out=tmp_path, progress=False)
    assert sorted(load_draws(f).id for f in tmp_path.glob("draws-*")) == sorted(ids)
    assert None not in e.draw([QA("\ud800", "half a \ud800 letter", "x")], 2)[0].texts


def test_files_without_a_source_are_still_read(tmp_path):
    "Draws written before `source` existed."
    import pyarrow.parquet as pq
    save_draws(draws_from_texts("q", ["a", None], source="m at http://x/v1"), tmp_path/"d.parquet")
    table = pq.read_table(tmp_path/"d.parquet")
    how = json.loads(table.schema.metadata[b"probunlearn"])
    del how["source"]
    pq.write_table(table.replace_schema_metadata({"probunlearn": json.dumps(how)}), tmp_path/"d.parquet")
    assert load_draws(tmp_path/"d.parquet").source == ""


def test_gaps_are_no_clean_answers(script):
    server = script(lambda body, _, count: (200, varied(body)) if count == 1 else (503, "busy"))
    with pytest.warns(RuntimeWarning): draws = server.endpoint(workers=1, tries=1).draw(ONE, 40)
    x = score_draws(draws, ONE, "exact_match")
    assert np.isnan(x).sum() == 36 and mean_bound(x, missing="worst").value.max() > .5
