"""In a real browser: a lesson and the app are opened, a slider moves by its keys, and the claim follows. `SCREENSHOTS=folder` keeps pictures at two widths."""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

NBS = Path(__file__).parent.parent/"nbs"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MINUTES = 60_000    # milliseconds

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="needs a browser: install Chromium, e.g. apt-get install chromium")]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[browser]'")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextlib.contextmanager
def served(folder, *command):
    "The address of a server that is started in `folder`, which it may write to."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", JUPYTER_CONFIG_DIR=str(folder/"config"), JUPYTER_RUNTIME_DIR=str(folder/"runtime"), IPYTHONDIR=str(folder/"ipython"),
                            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with open(folder/"log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-m", *command, f"--port={port}", "--no-browser"], cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.time() + 120
            while time.time() < until and process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1): break
                time.sleep(.3)
            else: pytest.fail(f"no server: {(folder/'log').read_text()[-2000:]}")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def wait_for_claim(page, minutes=8): page.wait_for_selector(".leak-explorer .claim", timeout=minutes*MINUTES)


def move(page, which, key):
    "Press `key` on a slider of the leak explorer; the claim before and after."
    claim = page.locator(".leak-explorer .claim").first
    before = claim.inner_text()
    page.locator(".leak-explorer [role=slider]").nth(which).focus()
    page.keyboard.press(key)
    page.wait_for_function("before => document.querySelector('.leak-explorer .claim').innerText != before", arg=before, timeout=2*MINUTES)
    return before, claim.inner_text()


def keep_pictures(page, name):
    "Screenshots at two widths, where somebody wants to look at them."
    for width in (1280, 400) if os.environ.get("SCREENSHOTS") else ():
        page.set_viewport_size(dict(width=width, height=1000))
        page.wait_for_timeout(1500)
        page.locator(".leak-explorer").first.scroll_into_view_if_needed()
        page.screenshot(path=Path(os.environ["SCREENSHOTS"])/f"{name}-{width}.png")


def check(page, name):
    before, after = move(page, 3, "End")            # the threshold, to its top
    assert "above 0.5 " in before and "above 0.95 " in after and "settings of the controls at once" in after
    _, fewer = move(page, 0, "Home")                # the draws, to their fewest
    assert "n = 64" in fewer
    wide = page.evaluate("() => { const img = document.querySelector('.leak-explorer img'); return [img.alt, img.clientWidth] }")
    assert "draws score" in wide[0] and wide[1] > 300
    keep_pictures(page, name)


def test_a_slider_of_lesson_1_moves_its_claim_in_jupyterlab(browser, tmp_path):
    shutil.copy(NBS/"tutorials"/"01_greedy_misleads.ipynb", tmp_path/"lesson.ipynb")
    with served(tmp_path, "jupyterlab", "--LabApp.expose_app_in_browser=True", "--ServerApp.token=t", "--allow-root") as at:
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.goto(f"{at}/doc/tree/lesson.ipynb?token=t&reset", timeout=2*MINUTES)
        page.wait_for_function("() => window.jupyterapp && jupyterapp.shell.currentWidget && jupyterapp.shell.currentWidget.sessionContext", timeout=2*MINUTES)
        page.evaluate("async () => { await jupyterapp.shell.currentWidget.sessionContext.ready; await jupyterapp.commands.execute('notebook:clear-all-cell-outputs'); jupyterapp.commands.execute('notebook:run-all-cells') }")
        wait_for_claim(page)
        check(page, "lesson")
        assert not page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'] >> text=Traceback").count()


def test_a_slider_of_the_app_moves_its_claim_in_voila(browser, tmp_path):
    pytest.importorskip("voila", reason="needs pip install -e '.[browser]'")
    shutil.copy(NBS/"app.ipynb", tmp_path/"app.ipynb")
    with served(tmp_path, "voila", "app.ipynb") as at:
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.goto(at, timeout=8*MINUTES)
        wait_for_claim(page)
        check(page, "app")
        assert page.locator(".temperature-explorer img").count() == 1
