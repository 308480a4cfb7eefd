"""What a server may send, and what may stand in its address: a malformed answer is one lost draw, never an abort."""
import json
import socket
import threading
import time
import warnings
from contextlib import suppress

import numpy as np
import pytest

from parrot import QAS
from probunlearn import endpoint
from probunlearn.endpoint import Endpoint
from probunlearn.evaluation import evaluate
from probunlearn.files import as_bytes
from probunlearn.runs import read_run
from servers import choices, script      # noqa: F401, a fixture

PROTOCOL, WITHHELD = "isn't of the OpenAI protocol", "withheld by the server"
GOOD = dict(text="fine", finish_reason="stop")

# one choice of four → why its draw is lost; None where it is an answer all the same
CHOICES = {
    "null": (None, WITHHELD),
    "a text": ("hello", PROTOCOL),
    "a number": (7, PROTOCOL),
    "a list": ([], PROTOCOL),
    "true": (True, PROTOCOL),
    "nothing": ({}, WITHHELD),
    "text 7": (dict(text=7), PROTOCOL),
    "text null": (dict(text=None), WITHHELD),
    "text list": (dict(text=["a"]), PROTOCOL),
    "text object": (dict(text={}), PROTOCOL),
    "text true": (dict(text=True), PROTOCOL),
    "message a text": (dict(message="hello"), PROTOCOL),
    "message a list": (dict(message=[1]), PROTOCOL),
    "message 7": (dict(message=7), PROTOCOL),
    "content 7": (dict(message=dict(content=7)), PROTOCOL),
    "content object": (dict(message=dict(content={"a": 1})), PROTOCOL),
    "content null": (dict(message=dict(content=None)), WITHHELD),
    "content of numbers": (dict(message=dict(content=[1])), PROTOCOL),
    "content of texts": (dict(message=dict(content=["a"])), PROTOCOL),
    "content parts": (dict(message=dict(content=[dict(type="text", text="ok")]), finish_reason="stop"), None),
    "content part 7": (dict(message=dict(content=[dict(type="text", text=7)])), PROTOCOL),
    "content part without text": (dict(message=dict(content=[dict(type="text")])), PROTOCOL),
    "half a character": (dict(text="a \ud800 b"), PROTOCOL),
    "half a character in a message": (dict(message=dict(content="\udc00")), PROTOCOL),
    "cut to nothing": (dict(text="", finish_reason="length"), WITHHELD),
    "filtered": (dict(text="a", finish_reason="content_filter"), WITHHELD),
    "aborted": (dict(text="a", finish_reason="abort"), WITHHELD),
    "reason list": (dict(text="a", finish_reason=[1]), None),
    "reason object": (dict(text="a", finish_reason={}), None),
    "control characters": (dict(text="a\x00\x1b[2J", finish_reason="stop"), None),
    "logprobs text": (dict(GOOD, logprobs="no"), None), "logprobs list": (dict(GOOD, logprobs=[1, 2]), None),
    "logprobs of texts": (dict(GOOD, logprobs=dict(tokens=["fine"], token_logprobs=["-1"])), None),
    "logprobs of null": (dict(GOOD, logprobs=dict(tokens=[None], token_logprobs=[None])), None),
    "logprobs above 0": (dict(GOOD, logprobs=dict(tokens=["fine", ""], token_logprobs=[5, 5])), None),
    "logprobs infinite": (dict(GOOD, logprobs=dict(tokens=["fine", "x"], token_logprobs=[-1e400, 0])), None),
    "logprobs huge": (dict(GOOD, logprobs=dict(tokens=["fine", "x"], token_logprobs=[-10**400, 0])), None),
    "logprobs content 7": (dict(GOOD, logprobs=dict(content=7)), None),
    "logprobs content of 7": (dict(GOOD, logprobs=dict(content=[7])), None),
    "logprobs torn": (dict(GOOD, logprobs=dict(content=[dict(token="fine")])), None),
    "index text": (dict(GOOD, index="first"), None),
    "index huge": (dict(GOOD, index=10**30), None),
    "index -1": (dict(GOOD, index=-1), None),
    "index null": (dict(GOOD, index=None), None),
    "index 1.5": (dict(GOOD, index=1.5), None),
    "reasoning 7": (dict(message=dict(content="a", reasoning=7), finish_reason="stop"), None),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_malformed_choice_is_one_lost_draw_and_is_never_asked_again(name, script, tmp_path):
    odd, why = CHOICES[name]
    server = script(lambda body, *_: (200, dict(choices=[odd, dict(GOOD), dict(GOOD, text="b"), dict(GOOD, text="c")])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = evaluate(server.endpoint(), QAS[:1], 4, out=tmp_path, progress=False)
        d = read_run(tmp_path).draws(QAS[0])
        before = len(server.bodies)
        evaluate(server.endpoint(), QAS[:1], 4, out=tmp_path, progress=False)
    assert len(server.bodies) == before and report.x.shape == (1, 4)        # nothing is asked twice
    if why is None: assert not d.lost and d.counts.sum() == 4
    else: assert list(d.lost) == [0] and why in d.lost[0] and d.counts.sum() == 3
    assert d.logprobs is None or not (d.logprobs > 0).any()


# whole replies: status, body, what is said of the lost draws
REPLIES = {
    "a list": (200, "[1]", PROTOCOL),
    "null": (200, "null", PROTOCOL),
    "a text": (200, '"hi"', PROTOCOL),
    "a number": (200, "7", PROTOCOL),
    "a page": (200, "<html>hello</html>", PROTOCOL),
    "nothing": (200, "", PROTOCOL),
    "torn": (200, '{"choices": [', PROTOCOL),
    "deep": (200, "[" * 100_000, PROTOCOL),
    "long number": (200, "9" * 6000, PROTOCOL),
    "no choices": (200, "{}", PROTOCOL),
    "choices null": (200, '{"choices": null}', PROTOCOL), "choices text": (200, '{"choices": "a"}', PROTOCOL),
    "choices object": (200, '{"choices": {"0": {}}}', PROTOCOL),
    "choices empty": (200, '{"choices": []}', "without choices"),
    "an error": (200, '{"error": {"message": "out of luck"}}', "an error instead of answers: out of luck"),
    "an error of null": (200, '{"error": 7}', "an error instead of answers: 7"),
    "a failure": (500, "boom", "HTTP 500: boom"),
    "a failure in escapes": (500, "\x1b[2Jboom", "HTTP 500: \\x1b[2Jboom"),
    "a long failure": (500, "x" * 10**6, "HTTP 500: xxx"),
    "half a character": (500, '{"error": "a \\ud800"}', "HTTP 500: a ?"),
    "a filter": (400, "content_filter", "content filter"),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_malformed_reply_is_lost_by_name_and_storable(name, script, tmp_path):
    status, body, sentence = REPLIES[name]
    server = script(lambda asked, *_: (status, body) if asked["prompt"].startswith("Question: Where is vault 0") else
                    (200, choices(*"abcd")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: evaluate(server.endpoint(), QAS, 4, out=tmp_path, progress=False)
        except (ConnectionError, ValueError) as e: assert "q0" in str(e)
    d = read_run(tmp_path).draws(QAS[0])
    assert set(d.lost) == {0, 1, 2, 3} and all(sentence in why and len(why) < 600 for why in d.lost.values()), d.lost
    assert read_run(tmp_path).draws(QAS[1]).texts == list("abcd")           # the others are kept


def dripping(reply, every=.02):
    "A server that sends one byte after the other, and its address."
    listener = socket.create_server(("127.0.0.1", 0))
    def drip(connection):
        with connection, suppress(OSError):
            connection.recv(2**16)
            for byte in reply:
                connection.sendall(bytes([byte]))
                time.sleep(every)
    def serve():
        with suppress(OSError):
            while True: threading.Thread(target=drip, args=(listener.accept()[0],), daemon=True).start()
    threading.Thread(target=serve, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


HEAD, ANSWER = b"HTTP/1.1 200 OK\r\n", json.dumps(choices("yes")).encode()
DRIPS = {
    "a body without end": HEAD + b"\r\n" + b" " * 10**4,
    "a body of a length": HEAD + b"Content-Length: 9999\r\n\r\n" + b" " * 10**4,
    "an answer, then blanks": HEAD + b"\r\n" + ANSWER + b" " * 10**4,
    "headers": HEAD + b"a: b\r\n" * 2000,
    "a status": b"HTTP/1.1 " + b"2" * 10**4,
}


@pytest.mark.parametrize("name", DRIPS)
def test_a_reply_that_drips_for_ever_is_cut(name, monkeypatch):
    "Ten silences long at most; here two, of half a second."
    monkeypatch.setattr("probunlearn.endpoint._LONGEST", 2)
    listener, url = dripping(DRIPS[name])
    begun = time.monotonic()
    with listener, pytest.warns(RuntimeWarning, match="no whole answer within 1 s"):
        d = Endpoint(url, "m", per_request=1, timeout=.5).draw(QAS[:1], 1)[0]
    assert .9 < time.monotonic() - begun < 20 and not d.answers and d.lost


def test_one_request_takes_ten_times_its_silence_at_most(): assert endpoint._LONGEST == 10


def test_a_reply_that_drips_to_its_end_is_an_answer():
    listener, url = dripping(HEAD + f"Content-Length: {len(ANSWER)}\r\n\r\n".encode() + ANSWER, every=.001)
    with listener: assert Endpoint(url, "m", per_request=1, timeout=1).draw(QAS[:1], 1)[0].texts == ["yes"]


def test_a_reply_without_end_is_stopped(script, monkeypatch):
    monkeypatch.setattr("probunlearn.endpoint._MOST", 10**5)
    server = script(lambda body, *_: (200, choices("x" * 10**6)))
    with pytest.warns(RuntimeWarning, match="a reply of more than 0 MB"):
        d = server.endpoint(per_request=1).draw(QAS[:1], 2)[0]
    assert not d.answers and d.lost


URLS = {
    "http://localhost:8000/v1 ": "spaces",
    " http://localhost/v1": "spaces",
    "http://local host/v1": "spaces",
    "http://localhost/v1\n": "spaces",
    "http://localhost\t/v1": "spaces",
    "http://ü.example/v1": "ASCII",
    "http://localhost:99999/v1": "port",
    "http://localhost:-1/v1": "port",
    "http://localhost:x/v1": "port",
    "http://localhost:0/v1": "port",
    "http://localhost:80:80/v1": "port",
    "": "must begin with",
    "localhost:8000": "must begin with",
    "ftp://localhost": "must begin with",
    "file:///etc/passwd": "must begin with",
    "http://": "must begin with",
    "http:///v1": "must begin with",
    "http://:80/v1": "must begin with",
    "http://[::1/v1": "no address",
    "http://user:secret@host/v1": "name or password",
    "http://token@host/v1": "name or password",
    "http://host/v1/completions": "without /completions",
    "http://host/v1/chat/completions": "without /completions",
    "http://host/v1\x00": "spaces",
    "http://host/v1\x1b[2J": "spaces", "javascript:alert(1)": "must begin with",
}


@pytest.mark.parametrize("url", URLS)
def test_a_bad_address_is_refused_before_anything_is_sent(url):
    with pytest.raises(ValueError, match=URLS[url]) as error: Endpoint(url, "m")
    assert "secret" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize("url", [None, 7, b"http://host", ["http://host"]])
def test_an_address_is_a_text(url):
    with pytest.raises(ValueError, match="url is a text"): Endpoint(url, "m")


EXTRAS = [
    ({"a": {1, 2}}, "plain values"),
    ({"a": float("nan")}, "plain values"),
    ({"a": float("inf")}, "plain values"),
    ({"a": object}, "plain values"),
          ([], "a dict of fields"), ({"temperature": 0}, "must not set temperature"), ({"n": 3}, "must not set n")]


@pytest.mark.parametrize("extra, sentence", EXTRAS, ids=range(len(EXTRAS)))
def test_what_cannot_be_sent_is_refused_at_once(extra, sentence):
    with pytest.raises(ValueError, match=sentence): Endpoint("http://host/v1", "m", extra=extra)


# --- answers of one's own model ---------------------------------------------------------------------------------------

ODD_ANSWERS = ["a \ud800", "\udfff", "ok \udc80 ok", "\ud83d", "\ude00\ud83d"]


@pytest.mark.parametrize("odd", ODD_ANSWERS, ids=ascii)
def test_an_answer_that_no_file_can_hold_is_lost_by_name_and_the_others_are_kept(odd, tmp_path):
    from parrot import SHORT, Parrot
    model = Parrot(lambda qa, i: odd if i == 1 else f"Karmo {i}")
    report = evaluate(model, QAS, 4, decoding=SHORT, out=tmp_path/"run", progress=False)
    memory = evaluate(model, QAS, 4, decoding=SHORT, progress=False)
    for qa in QAS:
        d = read_run(tmp_path/"run").draws(qa)
        assert d.texts == ["Karmo 0", None, "Karmo 2", "Karmo 3"] and "half a character" in d.lost[1]
    assert np.array_equal(report.x, memory.x, equal_nan=True) and report.missing.sum() == 2
    report.save(tmp_path/"report")


def test_text_is_stored_and_read_back():
    "JSON reads half a character back from its escape."
    assert json.loads(as_bytes(json.dumps("a \ud800 ü", ensure_ascii=False))) == "a \ud800 ü"
