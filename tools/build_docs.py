"""The documentation as a website: python tools/build_docs.py [FOLDER]

Pages are the committed notebooks; nothing in them is run. nbdev parses their directives; where a notebook exports code, its page
shows signature, documented parameters and, folded, the source. Then Sphinx builds (conf.py; a warning is an error) and every
internal link of the result is followed.
"""
import ast, io, re, shutil, sys, tokenize
from dataclasses import dataclass, field
from html.parser import HTMLParser
from os.path import relpath
from pathlib import Path
from urllib.parse import unquote, urlparse

import nbformat
from nbdev.process import NBProcessor
from nbdev.processors import hide_, hide_line, rm_header_dash, strip_ansi
from nbformat.v4 import new_code_cell, new_markdown_cell

from cells import NBS, ROOT, notebooks, parts

WIDGET = "application/vnd.jupyter.widget-view+json"
WORD = re.compile(r"^\| `(\w+)` \| (.+?) \|$", re.M)


# What a piece of exported source says about itself

@dataclass
class Entry:
    "One public name: a function, a class, a method or a constant."
    name: str
    kind: str               # Sphinx's: "function", "class", "method", "property" or "data"
    signature: str          # what follows the name
    doc: str                # the docstring
    arguments: list         # (names, default, comment)
    returns: str = ""       # the comment behind the return type
    members: list = field(default_factory=list)


def comments(source):
    "The trailing comments of `source` by line number."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def by_line(rows, said, words):
    "Arguments (line, name, default) as rows of a table: those that share a comment share a row; a word of the glossary explains itself."
    table = []
    for line, name, default in rows:
        comment = said.get(line, "")
        shared = comment and table and table[-1][2] == comment and table[-1][3] == line
        if shared: table[-1][0].append(name)
        else: table.append([[name], default, comment or words.get(name, ""), line])
    return [(names, default, comment) for names, default, comment, _ in table]


def function_entry(node, said, words, kind="function"):
    "The entry of a function or method."
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = dict(zip([p.arg for p in plain][::-1], a.defaults[::-1])) | {p.arg: d for p, d in zip(a.kwonlyargs, a.kw_defaults) if d}
    rows = [(p.lineno, p.arg, ast.unparse(defaults[p.arg]) if p.arg in defaults else "") for p in [*plain, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
            if p.arg not in ("self", "cls")]
    names = {ast.unparse(d) for d in node.decorator_list}
    if kind == "method" and names & {"property", "cached_property"}: kind = "property"
    if kind == "method": a.args = a.args[not names & {"staticmethod"}:]
    back = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    signature = "" if kind == "property" else f"({ast.unparse(a)}){back}"
    return Entry(node.name, kind, signature, ast.get_docstring(node) or "", by_line(rows, said, words), said.get(node.returns.lineno, "") if node.returns else "")


def class_entry(node, said, words):
    "The entry of a class, with its fields or the arguments of `__init__`, and its public methods."
    rows = [(b.lineno, b.target.id, ast.unparse(b.value) if b.value else "") for b in node.body if isinstance(b, ast.AnnAssign)]
    for before, b in zip(node.body, node.body[1:]):      # a field may be explained by a string below it
        if isinstance(before, ast.AnnAssign) and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant): said.setdefault(before.lineno, str(b.value.value))
    methods = [b for b in node.body if isinstance(b, ast.FunctionDef)]
    entry = Entry(node.name, "class", "", ast.get_docstring(node) or "", by_line(rows, said, words))
    for init in [m for m in methods if m.name == "__init__"]: entry.arguments += function_entry(init, said, words).arguments
    entry.members = [function_entry(m, said, words, "method") for m in methods if m.name[0] != "_"]
    return entry


def entries(source, words):
    "An entry per public name that `source` defines."
    said, lines = comments(source), source.splitlines()
    for node in ast.parse(source).body:
        above = said.get(node.lineno - 1, "") if node.lineno > 1 and lines[node.lineno - 2].startswith("# ") else ""         # what a constant is stands above it, or behind
        if isinstance(node, ast.FunctionDef) and node.name[0] != "_": yield function_entry(node, said, words)
        if isinstance(node, ast.ClassDef) and node.name[0] != "_": yield class_entry(node, said, words)
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name) and target.id[0] != "_": yield Entry(target.id, "data", "", above or said.get(node.lineno, ""), [])


# From notebooks to pages

@dataclass
class Book:
    "The notebooks with their directives parsed, and what they make public."
    cells: dict     # path → cells
    modules: dict   # module → path
    public: dict    # name → (module, Entry)
    words: dict     # arguments that mean the same everywhere

    @property
    def linked(self):
        "The names that prose links: public, and not also the name of an argument."
        return self.public.keys() - {name for _, e in self.public.values() for part in (e, *e.members) for names, *_ in part.arguments for name in names}


def is_export(cell): return cell.cell_type == "code" and bool({"export", "exports"} & cell.directives_.keys())


def read_book():
    "Every notebook, read once."
    words = dict(WORD.findall((NBS/"docs"/"api.md").read_text(encoding="utf-8")))
    book = Book({}, {}, {}, words)
    for path in notebooks():
        book.cells[path] = cells = NBProcessor(path, [strip_ansi, hide_line, rm_header_dash, hide_], process=True).nb.cells
        for cell in cells:
            if cell.cell_type == "code" and "default_exp" in cell.directives_: book.modules[module := cell.directives_["default_exp"][0]] = path
            if is_export(cell): book.public |= {e.name: (module, e) for e in entries(cell.source, words)}
    return book


def link(name, book):
    "A public name in Markdown, linked to its entry."
    return f"{{py:obj}}`{name} <probunlearn.{book.public[name][0]}.{name}>`"


def prose(text, book, path):
    "Markdown with public names and module names linked; headings, links and fenced code stay as they are."
    text = re.sub(r"(</summary>)(.*?)(</details>)", r"\1\n\n\2\n\n\3", text, flags=re.S)       # MyST reads Markdown between HTML only after an empty line
    names = book.public.keys() - book.words.keys() if path.parent.name == "docs" else book.linked
    def linked(m):
        if m[1] in names: return link(m[1], book)
        if m[1] in book.modules.keys() - book.words.keys() and book.modules[m[1]] != path: return f"[`{m[1]}`]({relpath(book.modules[m[1]], path.parent)})"
        return m[0]
    parts = re.split(r"(^```.*?^```|^#.*?$|\[[^\]\n]*\]\([^)\n]*\))", text, flags=re.M | re.S)
    return "".join(part if i % 2 else re.sub(r"(?<![`\w}])`(\w+)`(?!`)", linked, part) for i, part in enumerate(parts))


def plain(text):
    "A docstring or comment as Markdown: what is not in backticks is meant literally."
    return "".join(part if i % 2 else re.sub(r"([\\*_\[\]<>$|{}#~^])", r"\\\1", part) for i, part in enumerate(re.split(r"(`[^`]*`)", text))).replace("|", r"\|").replace(r"\\|", r"\|")


def entry_text(entry, module, fence=6):
    "One entry as a Sphinx directive in MyST Markdown."
    lines = [f"{':' * fence}{{py:{entry.kind}}} {entry.name}{entry.signature}"] + [f":module: probunlearn.{module}"] * (fence == 6) + ["", plain(entry.doc), ""]
    if entry.arguments or entry.returns:
        rows = [(", ".join(f"`{n}`" for n in names), f"`` {default} ``" if default else "", plain(comment)) for names, default, comment in entry.arguments]
        if entry.returns: rows.append(("*returns*", "", plain(entry.returns)))
        lines += ["| | default | |", "|---|---|---|", *(f"| {' | '.join(cell.replace(chr(10), ' ') for cell in row)} |" for row in rows), ""]
    return "\n".join([*lines, *(entry_text(m, module, fence - 1) for m in entry.members), ":" * fence, ""])


def frozen(outputs):
    "Outputs for a page without a kernel: of a widget stays the HTML that it was stored with."
    for output in outputs:
        data = output.get("data", {})
        if data.pop(WIDGET, None):
            if "text/html" not in data: continue
            data["text/html"] = f"<div class='frozen'>{''.join(data['text/html'])}<p>As it was left; it moves when the notebook runs.</p></div>"
        yield nbformat.from_dict(output)


def page_cells(path, book):
    "The cells of one page."
    module = next((name for name, home in book.modules.items() if home == path), None)
    for cell in book.cells[path]:
        if not (cell.source or "").strip() or cell.cell_type == "code" and {"default_exp", "exporti"} & cell.directives_.keys(): continue
        if cell.cell_type == "markdown": yield new_markdown_cell(prose(cell.source, book, path))
        elif is_export(cell):
            named = list(entries(cell.source, book.words))
            if named: yield new_markdown_cell("\n".join(entry_text(e, module) for e in named))
            if not all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(cell.source).body):
                yield new_code_cell(cell.source.strip(), metadata=dict(tags=["hide-input"]))
        elif cell.cell_type == "code": yield new_code_cell(cell.source.strip(), outputs=list(frozen(cell.get("outputs", []))))


def page(path, book):
    "One notebook as MyST-NB takes it."
    nb = nbformat.v4.new_notebook(metadata=dict(language_info=dict(name="python", pygments_lexer="ipython3")))
    nb.cells = list(page_cells(path, book))
    for i, cell in enumerate(nb.cells): cell.id = f"c{i}"
    return nb


def sections():
    "Caption and folder of each group of pages, in the order of the sidebar: the lessons first, then one caption a part."
    yield "Lessons", NBS/"tutorials"
    for folder in parts(): yield folder.name.replace("_", " ").capitalize(), folder
    yield "Recipes", NBS/"recipes"
    yield "Reference", NBS/"docs"


def title(path, number):
    "What the sidebar calls a page; lessons are numbered."
    cell = next(c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    return f"{number} {cell.source.partition(chr(10))[0].lstrip('# ')}"


def sidebar():
    "The tables of contents of the first page."
    for caption, folder in sections():
        pages = sorted([*folder.glob("*.ipynb"), *folder.glob("*.md")])
        names = [p.relative_to(NBS).with_suffix("").as_posix() for p in pages]
        if folder.name == "tutorials": names = [f"{title(p, i)} <{name}>" for i, (p, name) in enumerate(zip(pages, names), 1)]
        yield "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```"])


def names_table(book):
    "Every public name with its promise, by module."
    for module in book.modules:
        names = [(name, e) for name, (home, e) in book.public.items() if home == module]
        if names: yield "\n".join([f"## {module}", "", "| name | what it is |", "|---|---|", *(f"| {link(name, book)} | {plain(e.doc)} |" for name, e in names), ""])


def stage(out):
    "Write every page under `out`."
    book = read_book()
    shutil.copytree(NBS/"docs"/"images", out/"docs"/"images")
    for path in book.cells:
        nb, target = page(path, book), out/path.relative_to(NBS)
        if path.name == "index.ipynb": nb.cells += [new_markdown_cell(toc, id=f"toc{i}") for i, toc in enumerate(sidebar())]
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, target)
    for path in (NBS/"docs").glob("*.md"): (out/"docs"/path.name).write_text(prose(path.read_text(encoding="utf-8"), book, path), encoding="utf-8")
    with (out/"docs"/"api.md").open("a", encoding="utf-8") as file: file.write("\n" + "\n".join(names_table(book)))


# Does every link lead somewhere?

class Links(HTMLParser):
    "The links, loaded files and anchors of one HTML page."
    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs.get("id"), attrs.get("name")} - {None}
        if tag == "a" and "href" in attrs: self.links.append(attrs["href"] or "")
        if attrs.get("src"): self.loads.append(attrs["src"])
        if tag == "link" and attrs.get("href") and attrs.get("rel") in ("stylesheet", "icon", "shortcut icon", "preload"): self.loads.append(attrs["href"])


def broken_links(site):
    "Links of the built pages under `site` that lead nowhere, and files that a page would load from somewhere else."
    pages = {path.resolve(): Links(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, found in pages.items():
        for url in found.links + found.loads:
            parts = urlparse(url)
            if parts.scheme or parts.netloc:
                if url in found.loads and parts.scheme != "data": yield f"{path.relative_to(site.resolve())} loads {url} from elsewhere"
                continue
            target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target /= "index.html"
            if not target.is_file() or target in pages and unquote(parts.fragment) not in pages[target].anchors: yield f"{path.relative_to(site.resolve())} links to {url}"


def main(out=ROOT/"_docs"):
    from sphinx.cmd.build import main as sphinx
    work = ROOT/"_proc"
    shutil.rmtree(work, ignore_errors=True)
    stage(work/"pages")
    if code := sphinx(["-W", "--keep-going", "-q", "-c", str(ROOT/"tools"), "-d", str(work/"doctrees"), str(work/"pages"), str(work/"site")]): return code
    lost = list(broken_links(work/"site"))
    if lost: return "\n".join(lost)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(work/"site", out)
    print(f"{len(list(Path(out).rglob('*.html')))} pages in {relpath(out)}: every internal link leads somewhere")


if __name__ == "__main__": sys.exit(main(*map(Path, sys.argv[1:])))
