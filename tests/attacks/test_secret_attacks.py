"""A key stays where it is, a path is no name, nothing runs or calls unasked."""
import logging
import subprocess
import sys
import warnings

import pytest

from parrot import QAS
from probunlearn.data import load_qa
from probunlearn.endpoint import Endpoint
from probunlearn.evaluation import evaluate
from probunlearn.files import is_path
from probunlearn.models import load_model
from servers import choices, script      # noqa: F401, a fixture

KEY = "sk-S3cr3tS3cr3tS3cr3t"

NAMES = [
    "api_key",
    "apikey",
    "key",
    "api-key",
    "openai_api_key",
    "token",
    "access_token",
    "auth_token",
    "Authorization",
    "authorization",
    "auth",
    "secret",
         "client_secret",
         "password",
         "passwd",
         "bearer",
         "credentials",
         "credential",
         "headers",
         "extra_headers",
         "cookie",
         "API_KEY",
         "x_api_key",
         "hf_token"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nest", [lambda field: field, lambda field: dict(extra_body=field),
    lambda field: dict(a=[dict(b=field)])])
def test_a_field_that_names_a_key_is_refused(name, nest):
    with pytest.raises(ValueError, match=f"extra must not hold secrets, and it has the field '{name}'") as error:
        Endpoint("http://host/v1", "m", extra=nest({name: "hidden"}))
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize("value", [KEY, f"Bearer {KEY}", "hf_" + "a" * 30, "gsk_" + "b" * 40,
    "prefix sk-proj-" + "c" * 30])
def test_a_value_that_looks_like_a_key_is_refused(value):
    with pytest.raises(ValueError, match="a value that looks like a key") as error:
        Endpoint("http://host/v1", "m", extra=dict(user=value))
    assert value not in str(error.value)


HONEST = [
    dict(stop_token_ids=[1]),
    dict(skip_special_tokens=True),
    dict(min_tokens=1),
    dict(logit_bias={"5": 1}),
    dict(stop="\n"),
    dict(user="me"),
          dict(guided_regex="a+"),
          dict(ignore_eos=True),
          dict(max_completion_tokens=None),
          dict(chat_template_kwargs=dict(enable_thinking=False)),
          dict(include_stop_str_in_output=True), dict(keep_alive="5m"), dict(bad_words_token_ids=[[1]])]


@pytest.mark.parametrize("extra", HONEST, ids=str)
def test_honest_fields_are_sent(extra): assert Endpoint("http://host/v1", "m", extra=extra).identity["extra"] == extra


# where a server may put the key that it was sent: (status, body, headers)
ECHOES = {
    "an answer": (200, dict(choices=[dict(text=f"the key is {KEY}", finish_reason="stop")] * 4), {}),
    "a message": (200, dict(choices=[dict(message=dict(content=f"{KEY}"), finish_reason="stop")] * 4), {}),
    "a finish reason": (200, dict(choices=[dict(text="", finish_reason="length"),
        dict(text=None, finish_reason=KEY)] * 2), {}),
    "an error": (200, dict(error=dict(message=f"bad {KEY}")), {}),
    "a status": (500, f"Authorization: Bearer {KEY}", {}),
    "a refusal": (401, dict(error=f"wrong key {KEY}"), {}), "a bad request": (400, dict(detail=f"field {KEY}"), {}),
    "no such model": (404, f"no {KEY}", {}),
    "elsewhere": (307, "", {"Location": f"http://{KEY}/v1"}),
    "too many": (429, f"{KEY} is over its quota", {}),
    "elsewhere by name": (301, "", {"Location": f"//u:{KEY}@other/v1?key={KEY}"}),
    "a long error": (500, "x" * 490 + KEY, {}),
}


@pytest.mark.parametrize("name", ECHOES)
def test_the_key_comes_back_nowhere(name, script, monkeypatch, tmp_path, caplog, capsys):
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.INFO)
    server = script(lambda *_: ECHOES[name])
    endpoint = server.endpoint("?key=" + KEY, key="MY_KEY", tries=1)
    said = [repr(endpoint), str(endpoint), repr(endpoint.identity), endpoint.source, endpoint.name, endpoint.asked]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            report = evaluate(endpoint, QAS[:1], 4, out=tmp_path/"run", progress=True)
            report.save(tmp_path/"run"/"report")
            said += [str(report), repr(report.forget.draws), report.decoding]
        except (ValueError, OSError, ConnectionError) as e: said += [str(e), repr(e)]
    said += [str(w.message) for w in caught] + [caplog.text, *capsys.readouterr()]
    files = [p.read_bytes() for p in (tmp_path/"run").glob("*")]
    secret = KEY[:12]
    assert secret not in "".join(said) and not any(secret.encode() in data for data in files)


@pytest.mark.parametrize("url", ["http://host/v1?api_key=hidden", "http://host/v1#hidden",
    "https://host/v1?a=1&sig=hidden"])
def test_the_query_is_never_shown(url):
    e = Endpoint(url, "m")
    for shown in (repr(e), str(e), e.source, str(e.identity), repr([e])): assert "hidden" not in shown
    for bad in (url.replace("host", "ho st"), url.replace("http", "ftp", 1), url.replace("/v1", "/v1/completions")):
        with pytest.raises(ValueError) as error: Endpoint(bad, "m")
        assert "hidden" not in str(error.value)


@pytest.mark.parametrize("key", [KEY, "lower", "A-B", "", "A B", "1A"])
def test_a_key_in_the_place_of_its_name_is_refused_unsaid(key):
    with pytest.raises(ValueError, match="never the key itself") as error: Endpoint("http://host/v1", "m", key=key)
    assert not key or key not in str(error.value).replace("name of an environment variable", "")


# --- paths are no names -----------------------------------------------------------------------------------------------

PATHS = [
    "models/typo",
    "data/typo",
    "./typo",
    "../typo",
    "/typo",
    "~/typo",
    "runs/a/b",
    "a/b/c",
    "checkpoints/last",
    "out/model",
    "Models/typo",
    "output/x",
         "C:\\models\\typo", "weights/x", "results/x/", "a/b/", "tmp/x", "here/typo"]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    "A folder, `here`, and no way out of the machine: who tries fails."
    (tmp_path/"here").mkdir()
    monkeypatch.chdir(tmp_path)
    def called(*args, **how): pytest.fail(f"the network was called: {args}")
    monkeypatch.setattr("socket.socket.connect", called)
    monkeypatch.setattr("socket.getaddrinfo", called)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("path", PATHS)
def test_what_looks_like_a_path_is_sent_to_no_hub(path, offline):
    assert is_path(path)
    with pytest.raises(FileNotFoundError, match="no such f"): load_model(path)
    with pytest.raises(FileNotFoundError, match="no such f"): load_qa(path)


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.2-1B", "locuslab/TOFU", "Qwen/Qwen3-0.6B",
    "microsoft/phi-1_5"])
def test_names_of_a_hub_are_no_paths(name, offline): assert not is_path(name)


# --- nobody is called -------------------------------------------------------------------------------------------------

TRACE = """
import os, socket, sys
os.environ.pop("HF_HUB_OFFLINE", None)
calls = []
def spy(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") and getattr(
            args[0], "family", None) != socket.AF_UNIX: calls.append((event, args))
sys.addaudithook(spy)
sys.path.insert(0, sys.argv[2])
folder = sys.argv[1]
import probunlearn
from probunlearn import *
from probunlearn.data import fictional_authors, load_qa
from probunlearn.draws import Decoding
from probunlearn.models import load_model, small_model
from probunlearn.evaluation import evaluate
from probunlearn.reading import report_run
from probunlearn.training import UnlearnConfig, unlearn
model = small_model("full")
model.save(f"{folder}/mine")
mine = load_model(f"{folder}/mine")
qas = fictional_authors("forget01")
report = evaluate(mine, qas, 4, decoding=Decoding(max_new_tokens=4), out=f"{folder}/run", progress=False)
report.save(f"{folder}/run/report")
report_run(f"{folder}/run")
unlearn(mine, qas, fictional_authors("retain90")[:4], UnlearnConfig(steps=1, batch_size=2))
assert not calls, calls
print("nobody was called")
"""


def test_import_evaluate_report_and_unlearn_call_nobody(tmp_path):
    done = subprocess.run([sys.executable, "-c", TRACE, tmp_path, "."], capture_output=True, text=True)
    assert done.stdout.strip().endswith("nobody was called"), done.stderr[-2000:]
