"""Servers that tests start: `transformers serve` with the packaged model, and a scripted one for what it never does."""
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from importlib.util import find_spec

import pytest
from packaging.version import Version

from probunlearn.data import Template
from probunlearn.endpoint import Endpoint
from probunlearn.models import small_model

LACKING = [name for name in ("fastapi", "uvicorn", "openai") if not find_spec(name)]
if Version(version("transformers")) < Version("5.6"):
    LACKING.append("transformers 5.6, from which on it is given a model")
real = pytest.mark.skipif(bool(LACKING), reason=f"transformers serve needs {', '.join(LACKING)}: "
                                                "pip install 'transformers[serving]'")
# the package's plain template as a chat template
CHAT = "{% for m in messages %}Question: {{ m['content'] }}\n{% endfor %}Answer:"
SERVE = "from transformers.cli.transformers import main; main()"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free: return free.getsockname()[1]


# --- a server that we didn't write ----------------------------------------------------------------------------------

class Served:
    "`transformers serve` on a folder, which can be killed and started again on the same port."
    def __init__(self, home):
        self.home = home
        self.port = free_port()
        self.start()

    def start(self):
        command = [sys.executable, "-c", SERVE, "serve", "small", "--device", "cpu", "--port", str(self.port)]
        self.log = open(self.home/"log", "a")
        self.process = subprocess.Popen(command, cwd=self.home, stdout=self.log, stderr=subprocess.STDOUT,
                                        env=os.environ | {"HF_HUB_OFFLINE": "1"})
        for _ in range(600):
            try: return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health")
            except OSError: time.sleep(.1)
        raise TimeoutError((self.home/"log").read_text())

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.log.close()

    def asked(self): return (self.home/"log").read_text().count("POST /v1/")

    def endpoint(self, **how):
        usual = dict(template=Template(), per_request=1, workers=1, tries=2)
        return Endpoint(f"http://127.0.0.1:{self.port}/v1", "small", **usual | how)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "A real server of the packaged model that never saw the forget authors."
    model = small_model("retain", device="cpu")
    model.lm.generation_config.do_sample = True
    model.lm.generation_config.top_k = 0
    model.tok.chat_template = CHAT
    home = tmp_path_factory.mktemp("served")
    model.save(home/"small")
    server = Served(home)
    yield server
    server.stop()


# --- a scripted server ----------------------------------------------------------------------------------------------

class Script(ThreadingHTTPServer):
    "Answers each request by `reply(body, headers, count)` → (status, dict or text, headers)."
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply):
        self.reply = reply
        self.bodies = []        # what was asked, in order
        self.times = []
        self.paths = []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(.02,), daemon=True).start()

    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}/v1"

    def endpoint(self, query="", **how):
        usual = dict(template=Template(), per_request=4, workers=4, tries=3, timeout=5)
        return Endpoint(self.url + query, "m", **usual | how)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.times.append(time.monotonic())
        self.server.paths.append(self.path)
        status, reply, headers = (*self.server.reply(body, self.headers, len(self.server.bodies)), {})[:3]
        data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        try: self.send(status, data, headers)
        except OSError: pass

    def send(self, status, data, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items(): self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "m-large"}, {"id": "m-small"}]}')

    def log_message(self, *_): pass


@pytest.fixture
def script():
    "Starts scripted servers: script(reply)."
    servers = []
    def start(reply):
        servers.append(Script(reply))
        return servers[-1]
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def choices(*texts, **more):
    "A reply with some answers."
    return dict(choices=[dict(index=i, text=t, finish_reason="stop") | more for i, t in enumerate(texts)])


def varied(body, k=None):
    "A reply whose answers tell the request's seed and their number."
    return choices(*(f"{body['seed']}-{i}" for i in range(k or body.get("n", 1))))
