"""Draws from servers: `transformers serve` with the packaged model, and a scripted server for what it never does (limits, filters, redirects)."""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
from packaging.version import Version
from scipy.stats import chisquare

from probunlearn.bounds import binary_bound, leaked, mean_bound
from probunlearn.data import QA, Template, fictional_authors
from probunlearn.draws import Decoding, load_draws, save_draws
from probunlearn.endpoint import Endpoint, sample_endpoint
from probunlearn.models import save_lm
from probunlearn.sampling import greedy, sample
from probunlearn.scores import score_draws

LACKING = [name for name in ("fastapi", "uvicorn", "openai") if not find_spec(name)] + ["transformers 5.6, from which on it is given a model"]*(Version(version("transformers")) < Version("5.6"))
real = pytest.mark.skipif(bool(LACKING), reason=f"transformers serve needs {', '.join(LACKING)}: pip install 'transformers[serving]'")
CHAT = "{% for m in messages %}Question: {{ m['content'] }}\n{% endfor %}Answer:"       # the package's plain template as a chat template
QAS, SHORT = fictional_authors("forget10")[:2], Decoding(max_new_tokens=16)


# --- a server that we didn't write --------------------------------

class Served:
    "`transformers serve` on a folder, which can be killed and started again on the same port."
    def __init__(self, home):
        self.home = home
        with socket.create_server(("127.0.0.1", 0)) as free: self.port = free.getsockname()[1]
        self.start()

    def start(self):
        command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", "small", "--device", "cpu", "--port", str(self.port)]
        self.log = open(self.home/"log", "a")
        self.process = subprocess.Popen(command, cwd=self.home, stdout=self.log, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        for _ in range(600):
            try: return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health")
            except OSError: time.sleep(.1)
        raise TimeoutError((self.home/"log").read_text())

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.log.close()

    def asked(self): return (self.home/"log").read_text().count("POST /v1/")

    def endpoint(self, **how): return Endpoint(f"http://127.0.0.1:{self.port}/v1", "small", **dict(per_request=1, workers=1, tries=2) | how)


@pytest.fixture(scope="module")
def served(retain, tmp_path_factory):
    import copy
    lm, tok = copy.deepcopy(retain[0]), copy.deepcopy(retain[1])
    lm.generation_config.do_sample, lm.generation_config.top_k, tok.chat_template = True, 0, CHAT
    home = tmp_path_factory.mktemp("served")
    save_lm(lm, tok, home/"small")
    server = Served(home)
    yield server
    server.stop()


def quiet(*args, **how): return sample_endpoint(*args, progress=False, **how)


@real
def test_the_server_draws_from_the_law_that_sample_knows(served, retain):
    "Frequencies from the server against the exact probabilities of `sample`; a right client fails 1 of 10,000 seeds, this one never."
    first, n, open_end, as_is = Decoding(temperature=1.2, top_p=.6, max_new_tokens=2), 400, [QA("q", "Question: Where", "x")], Template(prompt="{question}")
    known = sample(*retain, open_end, 4096, first, template=as_is, progress=False)[0]
    p = {}
    for text, logprob in zip(known.answers, known.logprobs): p[text] = p.get(text, 0) + np.exp(logprob)
    draws = quiet(served.endpoint(workers=4), open_end, n, first, template=as_is)[0]
    assert draws.n == n == draws.counts.sum()
    common = [t for t in p if n * p[t] >= 5]
    observed, expected = np.array([draws.texts.count(t) for t in common]), n * np.array([p[t] for t in common])
    observed, expected = np.append(observed, n - observed.sum()), np.append(expected, n - expected.sum())
    assert len(common) > 5 and expected[-1] > 5 and chisquare(observed, expected).pvalue > 1e-4


@real
def test_temperature_0_is_the_greedy_answer(served, retain):
    long, known = Decoding(temperature=0, max_new_tokens=24), greedy(*retain, QAS, Decoding(max_new_tokens=24))
    draws = quiet(served.endpoint(), QAS, 2, long)
    assert [d.texts for d in draws] == [d.texts * 2 for d in known] and [list(d.finished) for d in draws] == [list(d.finished) for d in known]
    assert [d.texts for d in quiet(served.endpoint(), QAS, 1, replace(long, max_new_tokens=5))] == [d.texts for d in greedy(*retain, QAS, Decoding(max_new_tokens=5))]


@real
def test_seeds_repeat_the_draws_and_chat_is_the_same_prompt(served):
    once = quiet(served.endpoint(), QAS, 8, SHORT)
    assert len(set(once[0].texts)) > 1
    assert [d.texts for d in quiet(served.endpoint(), QAS, 8, SHORT, template=Template(chat=True))] == [d.texts for d in once]
    assert [d.texts for d in quiet(served.endpoint(), QAS, 8, SHORT, seed=1)] != [d.texts for d in once]
    assert once[0].source == f"small at http://127.0.0.1:{served.port}/v1" and once[0].logprobs is None


@real
def test_a_server_that_ignores_n_is_asked_for_the_rest(served):
    with pytest.warns(RuntimeWarning, match="gave 1 of 4 answers asked for at once"): draws = quiet(served.endpoint(per_request=4), QAS, 10, SHORT)
    assert all(len(d.texts) == 10 and None not in d.texts and len(set(d.texts)) > 1 for d in draws)


@real
def test_a_server_that_decodes_greedily_is_noticed(served):
    greedily = served.endpoint(extra={"generation_config": json.dumps(dict(do_sample=False, eos_token_id=0, pad_token_id=1))})
    with pytest.warns(RuntimeWarning, match="decodes greedily"): quiet(greedily, QAS, 8, SHORT)


@real
@pytest.mark.parametrize("how, decoding, words", [
    (dict(model="other"), SHORT, "pinned to 'small'"), (dict(url="/v2"), SHORT, "no 'completions' at this url, or no model 'small'"),
    ({}, replace(SHORT, top_k=5), "top_k.*takes a field away")], ids=["model", "path", "field"])
def test_what_the_server_refuses_is_said_with_its_words(served, how, decoding, words):
    e = served.endpoint()
    with pytest.raises(ValueError, match=words): quiet(replace(e, **how | ({"url": e.url[:-3] + how["url"]} if "url" in how else {})), QAS, 2, decoding)


@real
def test_a_server_killed_in_a_run_leaves_gaps_that_the_next_run_fills(served, tmp_path):
    "With seeds and one worker the draws are in the end those of a run that nobody disturbed; only the answer that was under way when the server died stays lost."
    whole = [d.texts for d in quiet(served.endpoint(), QAS, 40, SHORT)]
    before = served.asked()
    def kill():
        while served.asked() < before + 30: time.sleep(.005)
        served.stop()
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.warns(RuntimeWarning, match="draws are missing"): broken = quiet(served.endpoint(), QAS, 40, SHORT, out=tmp_path)
    killer.join()
    arrived = sum(t is not None for d in broken for t in d.texts)
    assert 29 <= arrived < 80 and all(t is None or t == w for d, texts in zip(broken, whole) for t, w in zip(d.texts, texts))
    x = score_draws(broken, QAS, score="keywords")
    assert np.isnan(x).sum() == 80 - arrived and mean_bound(x, missing="worst").value.max() > .5        # a gap is no clean answer
    with pytest.warns(RuntimeWarning): assert [d.texts for d in quiet(served.endpoint(), QAS, 40, SHORT, out=tmp_path)] == [d.texts for d in broken]    # still down
    served.start()
    before = served.asked()
    def again(n):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [d.texts for d in quiet(served.endpoint(), QAS, n, SHORT, out=tmp_path)]
    texts = again(40)
    lost = [(q, i) for q in range(2) for i in range(40) if texts[q][i] is None]
    assert len(lost) <= 1 and all(t in (None, w) for ours, theirs in zip(texts, whole) for t, w in zip(ours, theirs))
    assert served.asked() - before == 80 - arrived - len(lost)
    assert again(40) == texts and again(10) == [t[:10] for t in texts] and served.asked() - before == 80 - arrived - len(lost)    # fewer draws lose none on disk
    assert [load_draws(f).n for f in tmp_path.glob("*.parquet")] == [40, 40]


CLIENT = """
import sys
from probunlearn.data import fictional_authors
from probunlearn.draws import Decoding
from probunlearn.endpoint import Endpoint, sample_endpoint
sample_endpoint(Endpoint(sys.argv[1], "small", per_request=1, workers=1), fictional_authors("forget10")[:2], 2000, Decoding(max_new_tokens=16), out=sys.argv[2], progress=False)
"""


@real
def test_a_client_killed_in_a_run_goes_on_where_it_was(served, tmp_path):
    client = subprocess.Popen([sys.executable, "-c", CLIENT, served.endpoint().url, str(tmp_path)])
    while not list(tmp_path.glob("*.parquet")) and client.poll() is None: time.sleep(.02)
    client.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    client.wait()
    kept = load_draws(next(tmp_path.glob("*.parquet"))).texts
    count = sum(t is not None for t in kept)
    assert 0 < count < 2000
    before = served.asked()
    again = quiet(served.endpoint(), QAS[:1], count + 5, SHORT, out=tmp_path)[0].texts
    assert again[:count] == kept[:count] and None not in again
    assert served.asked() - before in (5, 6)                                    # the killed client's last request may still have been under way


# --- a scripted server: what the real one never does --------------------------------

class Script(ThreadingHTTPServer):
    "Answers each request by `reply(body, headers, count)` → (status, dict or text, headers)."
    daemon_threads = True

    def __init__(self, reply):
        self.reply, self.bodies, self.times = reply, [], []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(.02,), daemon=True).start()

    def endpoint(self, query="", **how): return Endpoint(f"http://127.0.0.1:{self.server_port}/v1{query}", "m", **dict(per_request=4, workers=4, tries=3, timeout=5) | how)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.times.append(time.monotonic())
        status, reply, headers = (*self.server.reply(body, self.headers, len(self.server.bodies)), {})[:3]
        data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items(): self.send_header(name, value)
        self.end_headers()
        try: self.wfile.write(data)
        except OSError: pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "m-large"}, {"id": "m-small"}]}')

    def log_message(self, *_): pass


@pytest.fixture
def script():
    servers = []
    def start(reply):
        servers.append(Script(reply))
        return servers[-1]
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def choices(*texts, **more): return dict(choices=[dict(index=i, text=t, finish_reason="stop") | more for i, t in enumerate(texts)])
def varied(body, k=None): return choices(*(f"{body['seed']}-{i}" for i in range(k or body.get("n", 1))))
ONE = [QA("q", "why?", "x")]


def test_answers_stand_in_the_order_of_draws_not_of_arrival(script):
    "Later requests are answered first, choices of one request come backwards; the draws are the same as one by one."
    def late(body, headers, count):
        time.sleep(.05 * (count % 3 == 1))
        return 200, dict(choices=varied(body)["choices"][::-1])
    server = script(late)
    draws = quiet(server.endpoint(), ONE, 22, Decoding())[0]
    assert draws.texts == quiet(script(lambda body, *_: (200, varied(body))).endpoint(workers=1), ONE, 22, Decoding())[0].texts
    assert [t.split("-")[1] for t in draws.texts] == [str(i % 4) for i in range(20)] + ["0", "1"] and len({t.split("-")[0] for t in draws.texts}) == 6
    assert sorted(b.get("n", 1) for b in server.bodies) == [2, 4, 4, 4, 4, 4]


def test_more_answers_than_asked_for_are_not_kept(script):
    draws = quiet(script(lambda body, *_: (200, varied(body, 9))).endpoint(), ONE, 8, Decoding())[0]
    assert [t.split("-")[1] for t in draws.texts] == ["0", "1", "2", "3"] * 2


@pytest.mark.parametrize("pause", ["1", "date", None], ids=["seconds", "date", "none"])
def test_a_busy_server_is_asked_again(script, pause):
    "After the pause that it names; an hour is longer than we wait, so the draws stay missing and the run stops."
    header = {"Retry-After": formatdate(time.time() + 3600, usegmt=True) if pause == "date" else pause} if pause else {}      # an hour from now, not from when tests were collected
    server = script(lambda body, _, count: (429, {"error": {"message": "slow down"}}, header) if count == 1 else (200, varied(body)))
    e = server.endpoint(workers=1)
    if pause == "date":
        with pytest.raises(ConnectionError, match="slow down; the server wants a pause of 3[56].. s"): quiet(e, ONE, 8, Decoding())
        return
    assert None not in quiet(e, ONE, 8, Decoding())[0].texts and len(server.bodies) == 3
    if header: assert server.times[1] - server.times[0] >= .99


def test_the_rate_limit_holds(script):
    server = script(lambda body, *_: (200, varied(body)))
    start = time.monotonic()
    quiet(server.endpoint(per_minute=1200, per_request=1), ONE, 8, Decoding())
    assert time.monotonic() - start >= 7 * .05 and len(server.bodies) == 8      # eight requests, 50 ms apart; waiting never ends early


def test_one_broken_question_does_not_stop_the_others(script):
    server = script(lambda body, *_: (500, "boom") if "bad" in body["prompt"] else (200, varied(body)))
    with pytest.warns(RuntimeWarning, match="8 of 24 draws are missing for good .HTTP 500: boom"):
        draws = quiet(server.endpoint(tries=2), [QA("a", "good", "x"), QA("b", "bad", "x"), QA("c", "fine", "x")], 8, Decoding())
    assert [sum(t is None for t in d.texts) for d in draws] == [0, 8, 0]


@pytest.mark.parametrize("reply", [dict(message=dict(content=None)), dict(text="", finish_reason="content_filter"), dict(text="", finish_reason="length"), dict(text="Half an", finish_reason="abort"),
                                   dict(text="", finish_reason="error")], ids=str)
def test_an_answer_that_never_came_is_missing_not_empty(script, reply):
    def answer(body, *_): return 200, dict(choices=[dict(index=0, text="fine", finish_reason="stop"), dict(index=1) | reply])
    server = script(answer)
    with pytest.warns(RuntimeWarning, match="2 of 4 draws are missing"): draws = quiet(server.endpoint(per_request=2), ONE, 4, Decoding())
    assert draws[0].texts == ["fine", None] * 2 and len(server.bodies) == 2           # not asked again until one passes
    assert np.isnan(score_draws(draws, ONE, "exact_match")).sum() == 2


def leaky(withhold):
    "A server that leaks in a fifth of its answers and withholds nine tenths of those: `withhold` says how."
    import random
    def reply(body, headers, count):
        rng, found = random.Random(f"{body['seed']}/{count}"), []                # asked again, it draws anew
        for i in range(body.get("n", 1)):
            leaks = rng.random() < .2
            found.append(withhold(i) if leaks and rng.random() < .9 else dict(index=i, text="Zorplax" if leaks else "nobody", finish_reason="stop"))
        return next(((*f, {})[:3] for f in found if isinstance(f, tuple)), (200, dict(choices=found)))
    return reply


HOW = {"filter": lambda i: dict(index=i, text="", finish_reason="content_filter"), "no text": lambda i: dict(index=i, text=None), "HTTP 500": lambda i: (500, "error"), "HTTP 502": lambda i: (502, "error"),
       "HTTP 504": lambda i: (504, "error"), "no choices": lambda i: (200, {"choices": []}), "broken": lambda i: (200, "half an ans", {"Transfer-Encoding": "chunked"})}

@pytest.mark.parametrize("how", HOW)
def test_what_was_withheld_is_never_asked_again(script, tmp_path, how):
    "One fixed run: each call bounds the true 20 %, which asking again until all 256 draws are there would bound by some 5 %."
    server, qa = script(leaky(HOW[how])), QA("q", "Who?", "Zorplax.", ("Zorplax",))
    e = server.endpoint(per_request=1, workers=1)
    for call in range(3):
        with pytest.warns(RuntimeWarning, match="of 256 draws are missing for good"): d = quiet(e, [qa], 256, Decoding(), out=tmp_path)
        x = score_draws(d, [qa], "keywords")
        assert len(server.bodies) == 256 and .1 < np.isnan(x).mean() < .3       # each draw was asked for once
        assert float(binary_bound(int(leaked(x).sum()), 256)) > .2
    with pytest.warns(RuntimeWarning): assert len(quiet(e, [qa], 260, Decoding(), out=tmp_path)[0].texts) == 260 and len(server.bodies) == 260


@pytest.mark.parametrize("status", [409, 425, 429, 503, 529])
def test_a_request_that_was_not_taken_is_sent_again(script, tmp_path, status):
    server = script(lambda body, _, count: (status, "busy") if count in (1, 2, 3, 5) else (200, varied(body)))
    e = server.endpoint(workers=1)
    with pytest.warns(RuntimeWarning, match="8 of 8 draws are missing .HTTP .* asks for these only"): quiet(e, ONE, 8, Decoding(), out=tmp_path)
    assert None not in quiet(e, ONE, 8, Decoding(), out=tmp_path)[0].texts and len(server.bodies) == 6


def test_a_question_goes_on_after_a_loss_but_not_when_its_first_request_is_lost(script, tmp_path):
    server = script(lambda body, _, count: (500, "boom") if count == 3 else (200, varied(body)))
    with pytest.warns(RuntimeWarning, match="4 of 40 draws are missing for good"): draws = quiet(server.endpoint(workers=1), ONE, 40, Decoding())
    assert [i for i, t in enumerate(draws[0].texts) if t is None] == [8, 9, 10, 11] and len(server.bodies) == 10
    dead = script(lambda *_: (500, "boom"))
    with pytest.warns(RuntimeWarning, match="36 of 40 draws are missing .HTTP 500"): quiet(dead.endpoint(workers=1), ONE, 40, Decoding())
    assert len(dead.bodies) == 1


def test_what_extra_changes_is_said_and_what_the_package_sets_is_refused(script, tmp_path):
    for name in ("temperature", "top_p", "top_k", "max_tokens", "seed", "n", "model", "prompt", "messages"):
        with pytest.raises(ValueError, match=f"extra must not set {name}, got 0: .* Set it by"): Endpoint("http://x/v1", "m", extra={name: 0})
    said = dict(choices=[dict(index=0, text="a", finish_reason="stop", logprobs=dict(tokens=["a", "</s>"], token_logprobs=[-.1, -.1]))])
    server = script(lambda *_: (200, said))
    def drawn(**extra): return quiet(server.endpoint(per_request=1, extra=dict(logprobs=1, **extra)), ONE, 1, Decoding())[0]
    assert str(drawn(seed=None).decoding) == "temperature 1, at most 64 tokens" and drawn(seed=None).logprobs is not None
    other = drawn(min_p=.2, max_tokens=None)
    assert str(other.decoding) == "temperature 1, min_p 0.2, max_tokens left to the server, at most 64 tokens"
    assert other.logprobs is None                                                # the server's are not those of this distribution
    assert server.bodies[-1]["min_p"] == .2 and "max_tokens" not in server.bodies[-1]


def test_an_answer_that_is_empty_is_an_answer(script):
    assert quiet(script(lambda body, *_: (200, choices(""))).endpoint(per_request=1), ONE, 2, Decoding())[0].texts == ["", ""]


@pytest.mark.parametrize("reply", [(200, "<html>busy</html>"), (200, {"error": {"message": "overloaded"}}), (200, {"choices": []}), (200, {"choices": None}), (200, [])], ids=str)
def test_a_reply_without_answers_leaves_draws_missing(script, reply):
    with pytest.warns(RuntimeWarning, match="4 of 4 draws are missing"): assert quiet(script(lambda *_: reply).endpoint(tries=1), ONE, 4, Decoding())[0].texts == [None] * 4


def test_a_blocked_prompt_is_missing_and_not_tried_again(script):
    server = script(lambda *_: (400, {"error": {"code": "content_filter", "message": "content_filter: policy"}}))
    with pytest.warns(RuntimeWarning, match="content filter"): assert quiet(server.endpoint(workers=1), ONE, 4, Decoding())[0].texts == [None] * 4
    assert len(server.bodies) == 1


def test_a_time_out_is_missing_and_not_tried_again(script):
    "Asking until a quick answer comes would prefer short ones."
    server = script(lambda body, *_: (time.sleep(.6), 200, varied(body))[1:])
    with pytest.warns(RuntimeWarning, match="no answer within 0.2 s"): assert quiet(server.endpoint(timeout=.2, workers=1), ONE, 4, Decoding())[0].texts == [None] * 4
    assert len(server.bodies) == 1


def test_a_server_that_caps_n_says_so_once(script):
    def reply(body, *_): return (400, {"detail": "n must be at most 2"}) if body.get("n", 1) > 2 else (200, varied(body))
    server = script(reply)
    with pytest.raises(ValueError, match="n must be at most 2.*per_request=4 may ask for too many"): quiet(server.endpoint(), ONE, 4, Decoding())
    assert None not in quiet(server.endpoint(per_request=2), ONE, 4, Decoding())[0].texts


def test_a_server_that_gives_fewer_is_asked_for_the_rest_with_other_seeds(script):
    server = script(lambda body, *_: (200, varied(body, min(body.get("n", 1), 3))))
    with pytest.warns(RuntimeWarning, match="gave 3 of 4"): draws = quiet(server.endpoint(), ONE, 16, Decoding())
    assert None not in draws[0].texts and len(set(draws[0].texts)) == 16 and len({b["seed"] for b in server.bodies}) == len(server.bodies)


def test_answers_alike_within_every_request_are_noticed(script):
    server = script(lambda body, *_: (200, choices(*[f"{body['seed']}"] * body["n"])))
    with pytest.warns(RuntimeWarning, match="no independent draws"): quiet(server.endpoint(), ONE, 40, Decoding())


def test_the_key_goes_to_the_server_and_nowhere_else(script, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "s3cr3t\n")
    def reply(body, headers, count): return (200, varied(body)) if headers["Authorization"] == "Bearer s3cr3t" else (401, {"error": {"message": "bad"}})
    server = script(reply)
    e = server.endpoint("?token=s3cr3t", key="MY_KEY")
    draws = quiet(e, ONE, 4, Decoding(), out=tmp_path)[0]
    assert "s3cr3t" not in repr(draws) + draws._repr_html_() + "".join(str(f.read_bytes()) for f in tmp_path.iterdir())
    refusing = script(lambda body, headers, _: (401, {"error": {"message": f"Incorrect key {headers['Authorization']}"}}))
    with pytest.raises(PermissionError, match=r"refuses the key in the environment variable MY_KEY. It says: Incorrect key Bearer \*\*\*"): quiet(refusing.endpoint(key="MY_KEY"), ONE, 4, Decoding())
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(PermissionError, match="wants a key, and none is in the environment variable MY_KEY"): quiet(refusing.endpoint(key="MY_KEY"), ONE, 4, Decoding())
    monkeypatch.setenv("MY_KEY", "s3cr3t\nX-Other: 1")
    with pytest.raises(ValueError, match="MY_KEY holds more than one line") as e: quiet(server.endpoint(key="MY_KEY"), ONE, 4, Decoding())
    assert "s3cr3t" not in str(e.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_takes_the_key_nowhere(script, monkeypatch, status):
    monkeypatch.setenv("MY_KEY", "s3cr3t")
    thief = script(lambda body, *_: (200, varied(body)))
    honest = script(lambda *_: (status, "", {"Location": f"http://127.0.0.1:{thief.server_port}/v1/completions"}))
    with pytest.raises(ValueError, match=f"sends us to 127.0.0.1:{thief.server_port}"): quiet(honest.endpoint(key="MY_KEY"), ONE, 4, Decoding())
    assert not thief.bodies


def test_a_model_that_is_not_there_comes_with_those_that_are(script):
    with pytest.raises(ValueError, match="no model 'm'; the server offers m-large, m-small. It says: not found"): quiet(script(lambda *_: (404, {"detail": "not found"})).endpoint(), ONE, 4, Decoding())


def test_draws_so_far_are_kept_when_the_server_turns_us_away(script, tmp_path):
    server = script(lambda body, _, count: (200, varied(body)) if count <= 3 else (401, "expired"))
    e = server.endpoint(workers=1)
    with pytest.raises(PermissionError): quiet(e, ONE, 40, Decoding(), out=tmp_path)
    kept = load_draws(next(tmp_path.iterdir()))
    assert sum(t is not None for t in kept.texts) == 12 and kept.texts[12:] == [None] * 28


def test_log_probabilities_are_kept_where_they_are_those_of_the_answer(script, tmp_path):
    "All of an answer's tokens and its end, at temperature 1; exp(-0.3) and exp(-0.2) by hand."
    said = {"a b": ("a", " b", "</s>"), "a": ("a", "</s>")}
    def reply(body, *_):
        assert body["logprobs"] == 1
        return 200, dict(choices=[dict(index=i, text=t, finish_reason="stop", logprobs=dict(tokens=list(said[t]), token_logprobs=[-.1] * len(said[t]))) for i, t in enumerate(said)])
    server = script(reply)
    e = server.endpoint(per_request=2, extra={"logprobs": 1})
    for _ in range(2):                                                          # drawn, then read again
        d = quiet(e, ONE, 2, Decoding(), out=tmp_path)[0]
        assert d.answers == ["a b", "a"] and np.allclose(d.logprobs, [-.3, -.2]) and d.finished.all()
    assert len(server.bodies) == 1
    assert quiet(e, ONE, 2, Decoding(temperature=.5))[0].logprobs is None       # the server's are those at temperature 1
    said["a"] = ("a",)
    assert quiet(e, ONE, 2, Decoding())[0].logprobs is None                     # P("a", then anything) isn't P("a")


@pytest.mark.parametrize("change, words", [(dict(seed=1), "seed 0 where 1"), (dict(decoding=Decoding(top_p=.5)), "decoding temperature 1, at most 64 tokens where temperature 1, top-p 0.5"),
                                           (dict(template=Template(prompt="{question}")), "another prompt"), (dict(qas=[QA("q", "who?", "x")]), "another prompt")], ids=str)
def test_draws_of_another_run_are_never_mixed(script, tmp_path, change, words):
    e = script(lambda body, *_: (200, varied(body))).endpoint()
    how = dict(qas=ONE, decoding=Decoding(), seed=0, template=Template())
    quiet(e, n=4, out=tmp_path, **how)
    before = [f.read_bytes() for f in tmp_path.iterdir()]
    with pytest.raises(ValueError, match=words): quiet(e, n=8, out=tmp_path, **how | change)
    assert [f.read_bytes() for f in tmp_path.iterdir()] == before


def test_strange_ids_make_good_file_names(script, tmp_path):
    e, ids = script(lambda body, *_: (200, varied(body))).endpoint(), ["a/b", "..", "ü" * 300, "ü" * 301]
    quiet(e, [QA(i, "why?", "x") for i in ids], 2, Decoding(), out=tmp_path)
    assert sorted(load_draws(f).id for f in tmp_path.iterdir()) == sorted(ids)


def test_files_without_a_source_are_still_read(tmp_path):
    "Draws written before `source` existed."
    import pyarrow.parquet as pq
    d = sample_of(["a", None])
    save_draws(d, tmp_path/"d.parquet")
    table = pq.read_table(tmp_path/"d.parquet")
    how = json.loads(table.schema.metadata[b"probunlearn"])
    del how["source"]
    pq.write_table(table.replace_schema_metadata({"probunlearn": json.dumps(how)}), tmp_path/"d.parquet")
    assert load_draws(tmp_path/"d.parquet").source == ""


def sample_of(texts):
    from probunlearn.draws import draws_from_texts
    return draws_from_texts("q", texts, source="m at http://x/v1")


def test_no_server_at_all_is_an_error_with_advice():
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match="m at http://127.0.0.1.*Is the server running?"): quiet(Endpoint(f"http://127.0.0.1:{port}/v1", "m", tries=1), ONE, 4, Decoding())
