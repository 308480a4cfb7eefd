"""In a real browser: a lesson and the app are opened, a slider moves, the claim follows; every page of the website opens.

`SCREENSHOTS=folder` keeps pictures at two widths, of the website light and dark.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from threading import Thread

import pytest

NBS = Path(__file__).parent.parent/"nbs"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MINUTES = 60_000    # milliseconds

NO_BROWSER = "needs a browser: install Chromium, e.g. apt-get install chromium"
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason=NO_BROWSER)]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[browser]'")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def surroundings(folder):
    "The environment of a server that keeps to its folder."
    own = dict(JUPYTER_CONFIG_DIR=folder/"config", JUPYTER_RUNTIME_DIR=folder/"runtime", IPYTHONDIR=folder/"ipython")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {k: str(v) for k, v in own.items()} | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PATH=path)


def wait_for_server(process, port, log):
    until = time.time() + 120
    while time.time() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1): return
        time.sleep(.3)
    pytest.fail(f"no server: {log.read_text()[-2000:]}")


@contextlib.contextmanager
def served(folder, *command):
    "The address of a server that is started in `folder`, which it may write to."
    port = free_port()
    words = [sys.executable, "-m", *command, f"--port={port}", "--no-browser"]
    with open(folder/"log", "wb") as log:
        how = dict(cwd=folder, env=surroundings(folder), stdout=log, stderr=log, start_new_session=True)
        process = subprocess.Popen(words, **how)
        try:
            wait_for_server(process, port, folder/"log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def wait_for_claim(page):
    "What isn't in view may have no `innerText`."
    said = "text => document.querySelector('.leak-explorer .claim')?.[text]"
    page.wait_for_function(said, arg="textContent", timeout=8*MINUTES)
    page.locator(".leak-explorer").first.scroll_into_view_if_needed()
    page.wait_for_function(said, arg="innerText", timeout=MINUTES)


def move(page, which, key):
    "Press `key` on a slider of the leak explorer; the claim before and after."
    claim = page.locator(".leak-explorer .claim").first
    before = claim.inner_text()
    page.locator(".leak-explorer [role=slider]").nth(which).focus()
    page.keyboard.press(key)
    moved = "before => document.querySelector('.leak-explorer .claim').innerText != before"
    page.wait_for_function(moved, arg=before, timeout=2*MINUTES)
    return before, claim.inner_text()


def keep_pictures(page, name):
    "Screenshots at two widths, where somebody wants to look at them."
    for width in (1280, 400) if os.environ.get("SCREENSHOTS") else ():
        page.set_viewport_size(dict(width=width, height=1000))
        page.wait_for_timeout(1500)
        page.locator(".leak-explorer").first.scroll_into_view_if_needed()
        page.screenshot(path=Path(os.environ["SCREENSHOTS"])/f"{name}-{width}.png")


PICTURE = "() => { const img = document.querySelector('.leak-explorer img'); return [img.alt, img.clientWidth] }"
CUT = "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)"


def check(page, name):
    before, after = move(page, 3, "Home")           # the threshold, to its lowest
    assert "of at least 1 is" in before and "of at least 0.05 is" in after
    assert "settings of the controls at once" in after
    _, fewer = move(page, 0, "Home")                # the draws, to their fewest
    assert "n = 64" in fewer
    alt, width = page.evaluate(PICTURE)
    assert "draws score" in alt and width > 300
    assert page.locator(".leak-explorer .widget-label").evaluate_all(CUT) == []     # no name is cut
    keep_pictures(page, name)


CELLS = """jupyterapp.shell.currentWidget.content.widgets.map(cell => cell.model).filter(cell => cell.type == 'code')"""
RAN = f"""part => {CELLS}.filter(cell => cell.sharedModel.source.includes(part))
    .map(cell => JSON.stringify(cell.outputs.toJSON())).join()"""
ERRORS = f"""() => {CELLS}.flatMap(cell => cell.outputs.toJSON())
    .filter(output => output.output_type == 'error').map(output => output.evalue)"""
READY = "() => window.jupyterapp && jupyterapp.shell.currentWidget && jupyterapp.shell.currentWidget.sessionContext"
RUN = """async () => {
    await jupyterapp.shell.currentWidget.sessionContext.ready;
    await jupyterapp.commands.execute('notebook:clear-all-cell-outputs');
    jupyterapp.commands.execute('notebook:run-all-cells');
}"""
# a lesson is longer than what JupyterLab keeps on the page, unless it is told to keep all
WHOLE = "@jupyterlab/notebook-extension/tracker.jupyterlab-settings", '{"windowingMode": "none"}'
# write an answer into the first stub, and run what stands from there to its check
ANSWER = """async answer => {
    const lesson = jupyterapp.shell.currentWidget.content;
    const find = said => lesson.widgets.findIndex(cell => cell.model.sharedModel.source.includes(said));
    const at = find('#| eval: false');
    lesson.widgets[at].model.sharedModel.setSource('#| eval: false\\n' + answer);
    for (let i = at; i <= find('step_1(softmax)'); i++) {
        lesson.activeCellIndex = i;
        await jupyterapp.commands.execute('notebook:run-cell');
    }
}"""


def errors(page, wait=True):
    "What the errors say that the notebook shows; waits for one."
    if wait: page.wait_for_function(f"() => ({ERRORS})().length", timeout=5*MINUTES)
    return page.evaluate(ERRORS)


@pytest.mark.slow
def test_lesson_1_in_jupyterlab(browser, tmp_path):
    "All cells run, though no step is written; a slider moves the claim; a wrong answer is told why, a right one taken."
    shutil.copy(NBS/"tutorials"/"01_greedy_misleads.ipynb", tmp_path/"lesson.ipynb")
    settings = tmp_path/"settings"
    (settings/WHOLE[0]).parent.mkdir(parents=True)
    (settings/WHOLE[0]).write_text(WHOLE[1])
    options = ("--LabApp.expose_app_in_browser=True", f"--LabApp.user_settings_dir={settings}",
               "--ServerApp.token=t", "--allow-root")
    with served(tmp_path, "jupyterlab", *options) as at:
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.goto(f"{at}/doc/tree/lesson.ipynb?token=t&reset", timeout=2*MINUTES)
        page.wait_for_function(READY, timeout=2*MINUTES)
        page.evaluate(RUN)
        last = f"({RAN})('texts == theirs[0].texts').includes('True')"
        page.wait_for_function(f"() => {last}", timeout=20*MINUTES)         # a kernel that runs cells moves no slider
        wait_for_claim(page)
        check(page, "lesson")
        assert page.evaluate(f"() => ({RAN})('step_1(softmax)')").count("Not yet.") == 1
        page.evaluate(ANSWER, "def softmax(logits, temperature): return np.exp(logits / temperature)")
        said = f"() => ({RAN})('step_1(softmax)').includes"
        page.wait_for_function(f"{said}('must sum to 1')", timeout=MINUTES)
        whole = "z = np.exp((logits - logits.max()) / temperature)"
        page.evaluate(ANSWER, f"def softmax(logits, temperature):\n    {whole}\n    return z / z.sum()")
        page.wait_for_function(f"{said}('Right.')", timeout=MINUTES)
        assert errors(page, wait=False) == []


def test_a_slider_of_the_app_moves_its_claim_in_voila(browser, tmp_path):
    pytest.importorskip("voila", reason="needs pip install -e '.[browser]'")
    shutil.copy(NBS/"recipes"/"app.ipynb", tmp_path/"app.ipynb")
    with served(tmp_path, "voila", "app.ipynb") as at:
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.goto(at, timeout=8*MINUTES)
        wait_for_claim(page)
        check(page, "app")
        assert page.locator(".temperature-explorer img").count() == 1


class Quiet(SimpleHTTPRequestHandler):
    "Serves files, and says nothing."
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def website(site):
    "The address of the website."
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def watched(browser, at, width):
    "A new browser page, and the list of what goes wrong on it."
    page, wrong = browser.new_page(viewport=dict(width=width, height=1000)), []
    def requested(request):
        if not request.url.startswith((f"{at}/", "data:")): wrong.append(f"{request.url} is elsewhere")
    def failed(request):
        aborted = request.failure == "net::ERR_ABORTED"                 # the page was left
        if not aborted: wrong.append(f"{request.url}: {request.failure}")
    def answered(response):
        if response.status >= 400: wrong.append(f"{response.url}: {response.status}")
    def logged(message):
        if message.type in ("error", "warning"): wrong.append(f"{page.url}: {message.text}")
    for event, told in (("request", requested), ("requestfailed", failed), ("response", answered), ("console", logged)):
        page.on(event, told)
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    return page, wrong


# pictures that do not show, what sticks out of the page where nothing scrolls it, and formulas that stayed TeX (\n is none)
UGLY = r"""() => {
    const all = what => [...document.querySelectorAll(what)], wide = document.documentElement.clientWidth;
    const scrolls = e => getComputedStyle(e).overflowX !== "visible";
    const held = e => e.tagName !== "ARTICLE" && (scrolls(e) || held(e.parentElement));
    const sticksOut = e => e.getClientRects().length && e.getBoundingClientRect().right > wide + 1;
    const out = all("article *").filter(e => sticksOut(e) && !held(e));
    const blank = all("article img").filter(e => !e.complete || !e.naturalWidth);
    const texts = all("article :is(p, li, td, dd, h1, h2, h3, summary, details)").flatMap(e => [...e.childNodes]);
    const tex = texts.filter(e => e.nodeType === 3 && /\$|\\(?!n)[a-z]/.test(e.data));
    return [
        ...blank.map(e => `no picture: ${e.src}`),
        ...out.map(e => `too wide: ${e.tagName} ${e.textContent.slice(0, 60)}`),
        ...tex.map(e => `TeX: ${e.data}`),
    ];
}"""
SHOWN = "index", "tutorials/01_greedy_misleads", "4_reports/07_widgets", "2_bounds/03_bounds", "docs/paper", "docs/api"


def keep_pages(page, website):
    "Screenshots of some pages, wide and narrow, light and dark, where somebody wants to look at them."
    for name, width in product(SHOWN, (1280, 400)) if os.environ.get("SCREENSHOTS") else ():
        page.set_viewport_size(dict(width=width, height=1000))
        page.goto(f"{website}/{name}.html")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=Path(os.environ["SCREENSHOTS"])/f"{Path(name).name}-{width}-{scheme}.png")


def test_every_page_of_the_website_loads_and_fits(browser, website, site):
    page, wrong = watched(browser, website, 1280)
    for path in sorted(site.rglob("*.html")):
        page.goto(f"{website}/{path.relative_to(site).as_posix()}")
        for width, scheme in ((1280, "light"), (400, "dark")):
            page.set_viewport_size(dict(width=width, height=1000))
            page.emulate_media(color_scheme=scheme)
            wrong += [f"{page.url} at {width}: {said}" for said in page.evaluate(UGLY)]
    keep_pages(page, website)
    page.close()
    assert wrong == []


def test_what_is_ugly_is_found(browser, website):
    page, wrong = watched(browser, website, 400)
    page.goto(website)
    page.evaluate("""() => {
        const wide = "<div style='width:900px'>wide</div>", tex = "<p>costs $2</p>";
        const held = "<div style='overflow-x:auto'><p style='width:900px'>held</p></div>";
        document.querySelector("article").innerHTML = "<img src=/nowhere.png>" + wide + held + tex;
        console.error("loud");
    }""")
    page.wait_for_function("() => document.querySelector('article img').complete")
    assert [said.split(": ")[0] for said in page.evaluate(UGLY)] == ["no picture", "too wide", "TeX"]
    assert any("nowhere.png: 404" in said for said in wrong) and any("loud" in said for said in wrong)
    page.close()


def test_widgets_show_how_they_were_left(browser, website):
    page, wrong = watched(browser, website, 400)
    page.goto(f"{website}/4_reports/07_widgets.html")
    shown = page.locator(".frozen").evaluate_all("""all => all.map(e => [
        e.querySelector('img').naturalWidth > 300 && e.querySelector('img').clientWidth > 250,
        e.querySelector('.claim').innerText,
        e.innerText])""")
    assert len(shown) == 6
    for wide, claim, text in shown:
        assert wide and len(claim) > 30 and text.split("\n")[0] == claim.split("\n")[0]
        assert text.endswith("it moves when the notebook runs.")
    assert "at every threshold and all 96 settings of the controls at once" in shown[1][1]
    assert page.locator(".frozen mark").count()
    page.close()
    assert wrong == []


def test_search_finds_std_bound(browser, website):
    page, wrong = watched(browser, website, 1280)
    page.goto(f"{website}/tutorials/01_greedy_misleads.html")
    page.locator("input[name=q]").first.fill("std_bound")
    page.keyboard.press("Enter")
    page.locator("#search-results a", has_text="probunlearn.bounds.std_bound").first.click(timeout=MINUTES)
    page.wait_for_url("**/2_bounds/03_bounds.html#probunlearn.bounds.std_bound")
    page.wait_for_function("""() => {
        const y = document.getElementById(location.hash.slice(1)).getBoundingClientRect().top;
        return y >= 0 && y < innerHeight;
    }""")                               # it scrolls there
    assert page.locator("[id='probunlearn.bounds.std_bound']").inner_text().startswith("std_bound(")
    page.close()
    assert wrong == []
