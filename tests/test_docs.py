"""The website: every page is made, every public name has its entry, and a link that leads nowhere is found."""
import re
from pathlib import Path

import nbformat
import pytest

from build_docs import broken_links, names_table, read_book, stage, typed
from cells import parts

NBS = Path(__file__).parent.parent/"nbs"
PAPER = (NBS/"docs"/"paper.md").read_text(encoding="utf-8")
HEADS = "|---", "| in the paper", "| what is pictured", "| beyond the paper"
LINES = [line for line in re.findall(r"^\|.*\|$", PAPER, re.M) if not line.startswith(HEADS)]
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in LINES]


@pytest.fixture(scope="module")
def book(): return read_book()


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")/"staged"
    stage(out)
    return out


def cells(path): return nbformat.read(path, as_version=4).cells
def sources(staged): return {path: [cell.source for cell in cells(path)] for path in staged.rglob("*.ipynb")}


def test_every_notebook_is_a_page_in_the_sidebar(staged, book):
    pages = {path.relative_to(staged).with_suffix("").as_posix() for path in staged.rglob("*.ipynb")}
    assert pages == {path.relative_to(NBS).with_suffix("").as_posix() for path in book.cells}
    tables = [source for source in sources(staged)[staged/"index.ipynb"] if "{toctree}" in source]
    listed = {line.rpartition("<")[2].rstrip(">") for table in tables for line in table.splitlines()}
    assert pages - {"index"} <= listed and "docs/paper" in listed


def test_the_sidebar_shows_lessons_first_and_numbered(staged):
    tables = [source for source in sources(staged)[staged/"index.ipynb"] if "{toctree}" in source]
    captions = [re.search(r":caption: (.*)", table)[1] for table in tables]
    assert captions == ["Lessons", *(folder.name.replace("_", " ") for folder in parts()), "Recipes", "Reference"]
    assert [line.split()[0] for line in tables[0].splitlines() if line.endswith(">")] == list("123456789")


def test_no_two_pages_have_one_name(book):
    titles = [next(cell.source for cell in cells(path) if cell.cell_type == "markdown") for path in book.cells]
    titles += [path.read_text(encoding="utf-8") for path in NBS.glob("docs/*.md")]
    names = [text.partition("\n")[0] for text in titles]
    assert [name for name in names if names.count(name) > 1] == []
    stems = [path.stem.lstrip("0123456789_") for path in book.modules.values()]
    assert len(set(stems)) == len(stems)


def test_every_public_name_has_one_entry(staged, book):
    text = "\n".join(cell for cells in sources(staged).values() for cell in cells)
    entries = re.findall(r"^::::::\{py:\w+\} (\w+)", text, re.M)
    assert sorted(entries) == sorted(book.public)
    assert [name for name, (_, entry) in book.public.items() if not entry.doc] == []


def test_the_list_of_names_starts_with_what_one_types(book):
    first, _, others = "\n".join(names_table(book)).partition("## All others")
    offered = [name for modules in typed().values() for names in modules.values() for name in names]
    def named(text): return re.findall(r"^\| \{py:obj\}`(\w+) ", text, re.M)
    assert named(first) == offered and set(named(others)) == book.public.keys() - set(offered)
    assert [f"### {part.capitalize()}" in first for part in typed()] == [True] * 9


def test_directives_and_hidden_cells_stay_behind(staged):
    directive = re.compile(r"^#\| *(export|exporti|hide|default_exp|slow|cuda)\b", re.M)
    assert [text for texts in sources(staged).values() for text in texts if directive.search(text)] == []


def test_widgets_become_pictures_and_claims(staged):
    code = [cell for cell in cells(staged/"4_reports"/"07_widgets.ipynb") if cell.cell_type == "code"]
    output, = [output for cell in code if cell.source.startswith("bound_explorer") for output in cell.outputs]
    html = output.data["text/html"]
    assert html.startswith("<div class='frozen'><img alt='Tightest that holds") and "truth 0.0100" in html
    assert "application/vnd.jupyter.widget-view+json" not in output.data


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:30])
def test_paper_index(row, book):
    idea, functions, lesson, difference = row
    assert idea and difference
    names = re.findall(r"`(\w+)`", functions)
    assert names and set(names) <= book.public.keys()
    links = re.findall(r"\]\(([^)]+)\)", lesson)
    assert links and all((NBS/"docs"/link).is_file() for link in links)


def test_broken_links_are_found(tmp_path):
    (tmp_path/"a.html").write_text('<p id="here"></p><a href="#here">1</a><a href="b.html#there">2</a>'
                                   '<a href="https://example.org">3</a><script src="b.js"></script>')
    (tmp_path/"b.html").write_text('<p id="there"></p>')
    (tmp_path/"b.js").write_text("")
    assert list(broken_links(tmp_path)) == []
    (tmp_path/"b.html").write_text('<a href="a.html#nowhere">1</a><a href="c.html">2</a>'
                                   '<img src="https://example.org/x.png"><link rel="stylesheet" href="c.css">')
    assert list(broken_links(tmp_path)) == [
        "a.html links to b.html#there",
        "b.html links to a.html#nowhere",
        "b.html links to c.html",
        "b.html loads https://example.org/x.png from elsewhere",
        "b.html links to c.css",
    ]


def test_site_is_built_without_a_warning_and_every_link_leads_somewhere(site, book):
    assert list(broken_links(site)) == []
    pages = {path.relative_to(NBS).with_suffix(".html").as_posix() for path in [*book.cells, *NBS.glob("docs/*.md")]}
    assert pages <= {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert "std_bound" in (site/"searchindex.js").read_text(encoding="utf-8")
