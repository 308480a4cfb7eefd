"""The website: every page is made, every public name has its entry, and a link that leads nowhere is found."""
import re
from pathlib import Path

import nbformat
import pytest

from build_docs import broken_links, read_book, stage

NBS = Path(__file__).parent.parent/"nbs"
PAPER = (NBS/"docs"/"paper.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", PAPER, re.M) if not row.startswith(("|---", "| in the paper", "| what is pictured"))]


@pytest.fixture(scope="module")
def book(): return read_book()


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")/"staged"
    stage(out)
    return out


def sources(staged): return {path: [cell.source for cell in nbformat.read(path, as_version=4).cells] for path in staged.rglob("*.ipynb")}


def test_every_notebook_is_a_page_in_the_sidebar(staged, book):
    pages = {path.relative_to(staged).with_suffix("").as_posix() for path in staged.rglob("*.ipynb")}
    assert pages == {path.relative_to(NBS).with_suffix("").as_posix() for path in book.cells}
    listed = {line.rpartition("<")[2].rstrip(">") for cell in sources(staged)[staged/"index.ipynb"] if "{toctree}" in cell for line in cell.splitlines()}
    assert pages - {"index"} <= listed and "docs/paper" in listed


def test_every_public_name_has_one_entry(staged, book):
    text = "\n".join(cell for cells in sources(staged).values() for cell in cells)
    entries = re.findall(r"^::::::\{py:\w+\} (\w+)", text, re.M)
    assert sorted(entries) == sorted(book.public)
    assert [name for name, (_, entry) in book.public.items() if not entry.doc] == []


def test_directives_and_hidden_cells_stay_behind(staged):
    assert [source for cells in sources(staged).values() for source in cells if re.search(r"^#\| *(export|hide|default_exp|slow|cuda)\b", source, re.M)] == []


def test_widgets_become_pictures_and_claims(staged):
    cells = nbformat.read(staged/"4_reports"/"07_widgets.ipynb", as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" and cell.source.startswith("bound_explorer") for output in cell.outputs]
    assert len(outputs) == 1 and outputs[0].data["text/html"].startswith("<div class='frozen'><img alt='Tightest that holds") and "truth 0.0100" in outputs[0].data["text/html"]
    assert "application/vnd.jupyter.widget-view+json" not in outputs[0].data


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:30])
def test_paper_index(row, book):
    idea, functions, lesson, difference = row
    assert idea and difference
    names = re.findall(r"`(\w+)`", functions)
    assert names and set(names) <= book.public.keys()
    links = re.findall(r"\]\(([^)]+)\)", lesson)
    assert links and all((NBS/"docs"/link).is_file() for link in links)


def test_broken_links_are_found(tmp_path):
    (tmp_path/"a.html").write_text('<p id="here"></p><a href="#here">1</a><a href="b.html#there">2</a><a href="https://example.org">3</a><script src="b.js"></script>')
    (tmp_path/"b.html").write_text('<p id="there"></p>')
    (tmp_path/"b.js").write_text("")
    assert list(broken_links(tmp_path)) == []
    (tmp_path/"b.html").write_text('<a href="a.html#nowhere">1</a><a href="c.html">2</a><img src="https://example.org/x.png"><link rel="stylesheet" href="c.css">')
    assert list(broken_links(tmp_path)) == ["a.html links to b.html#there", "b.html links to a.html#nowhere", "b.html links to c.html", "b.html loads https://example.org/x.png from elsewhere", "b.html links to c.css"]


def test_site_is_built_without_a_warning_and_every_link_leads_somewhere(site, book):
    assert list(broken_links(site)) == []
    assert {path.relative_to(NBS).with_suffix(".html").as_posix() for path in [*book.cells, *NBS.glob("docs/*.md")]} <= {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert "std_bound" in (site/"searchindex.js").read_text(encoding="utf-8")
