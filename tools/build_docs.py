"""The documentation as a website: python tools/build_docs.py [FOLDER]

Pages are the committed notebooks; nothing in them is run. nbdev parses their directives; where a notebook exports code,
its page shows signature, documented parameters and, folded, the source. Then Sphinx builds (conf.py; a warning is an
error) and every internal link of the result is followed.
"""
import ast
import io
import re
import shutil
import sys
import tokenize
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
    "Arguments (line, name, default) as rows; those that share a comment share a row, and the glossary helps out."
    table = []
    for line, name, default in rows:
        comment = said.get(line, "")
        shared = comment and table and table[-1][2] == comment and table[-1][3] == line
        if shared: table[-1][0].append(name)
        else: table.append([[name], default, comment or words.get(name, ""), line])
    return [(names, default, comment) for names, default, comment, _ in table]


def signature_rows(a):
    "(line, name, default) of each argument."
    plain = [*a.posonlyargs, *a.args]
    defaults = dict(zip([p.arg for p in plain][::-1], a.defaults[::-1]))
    defaults |= {p.arg: d for p, d in zip(a.kwonlyargs, a.kw_defaults) if d}
    for p in [*plain, a.vararg, *a.kwonlyargs, a.kwarg]:
        if p is None or p.arg in ("self", "cls"): continue
        yield p.lineno, p.arg, ast.unparse(defaults[p.arg]) if p.arg in defaults else ""


def function_entry(node, said, words, kind="function"):
    "The entry of a function or method."
    decorators = {ast.unparse(d) for d in node.decorator_list}
    arguments = by_line(signature_rows(node.args), said, words)
    if kind == "method" and decorators & {"property", "cached_property"}: kind = "property"
    if kind == "method" and "staticmethod" not in decorators: node.args.args = node.args.args[1:]
    back = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    signature = "" if kind == "property" else f"({ast.unparse(node.args)}){back}"
    returns = said.get(node.returns.lineno, "") if node.returns else ""
    return Entry(node.name, kind, signature, ast.get_docstring(node) or "", arguments, returns)


def string_below(before, node):
    "The text that explains a field from the line below it; None where there is none."
    if not (isinstance(before, ast.AnnAssign) and isinstance(node, ast.Expr)): return None
    return str(node.value.value) if isinstance(node.value, ast.Constant) else None


def class_entry(node, said, words):
    "The entry of a class, with its fields or the arguments of `__init__`, and its public methods."
    fields = [b for b in node.body if isinstance(b, ast.AnnAssign)]
    rows = [(b.lineno, b.target.id, ast.unparse(b.value) if b.value else "") for b in fields]
    for before, b in zip(node.body, node.body[1:]):
        if text := string_below(before, b): said.setdefault(before.lineno, text)
    methods = [b for b in node.body if isinstance(b, ast.FunctionDef)]
    entry = Entry(node.name, "class", "", ast.get_docstring(node) or "", by_line(rows, said, words))
    for m in methods:
        if m.name == "__init__": entry.arguments += function_entry(m, said, words).arguments
        if m.name[0] != "_": entry.members.append(function_entry(m, said, words, "method"))
    return entry


def constants(node, said, lines):
    "The entries of the constants that a statement makes; what one is stands above it, or behind."
    if not isinstance(node, ast.Assign): return
    is_above = node.lineno > 1 and lines[node.lineno - 2].startswith("# ")
    doc = said.get(node.lineno - 1, "") if is_above else said.get(node.lineno, "")
    for target in node.targets:
        if isinstance(target, ast.Name) and target.id[0] != "_": yield Entry(target.id, "data", "", doc, [])


def entries(source, words):
    "An entry per public name that `source` defines."
    said, lines = comments(source), source.splitlines()
    for node in ast.parse(source).body:
        public = getattr(node, "name", "_")[0] != "_"
        if isinstance(node, ast.FunctionDef) and public: yield function_entry(node, said, words)
        if isinstance(node, ast.ClassDef) and public: yield class_entry(node, said, words)
        yield from constants(node, said, lines)


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
        parts = [part for _, entry in self.public.values() for part in (entry, *entry.members)]
        return self.public.keys() - {name for part in parts for names, *_ in part.arguments for name in names}


def carries(cell, *flags): return cell.cell_type == "code" and bool({*flags} & cell.directives_.keys())
def is_export(cell): return carries(cell, "export", "exports")


def read_book():
    "Every notebook, read once."
    words = dict(WORD.findall((NBS/"docs"/"api.md").read_text(encoding="utf-8")))
    book = Book({}, {}, {}, words)
    for path in notebooks():
        cells = NBProcessor(path, [strip_ansi, hide_line, rm_header_dash, hide_], process=True).nb.cells
        book.cells[path] = cells
        for cell in cells:
            if carries(cell, "default_exp"):
                module = cell.directives_["default_exp"][0]
                book.modules[module] = path
            if is_export(cell): book.public |= {e.name: (module, e) for e in entries(cell.source, words)}
    return book


def typed():
    "What `probunlearn` itself offers: part → module → names. The package isn't imported."
    tree = ast.parse((ROOT/"probunlearn"/"__init__.py").read_text(encoding="utf-8"))
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "_PARTS")
    return {part: {module: names.split() for module, names in modules.items()}
            for part, modules in ast.literal_eval(table).items()}


def link(name, book):
    "A public name in Markdown, linked to its entry."
    return f"{{py:obj}}`{name} <probunlearn.{book.public[name][0]}.{name}>`"


def prose(text, book, path):
    "Markdown with public names and module names linked; headings, links and fenced code stay as they are."
    # MyST reads Markdown between HTML only after an empty line
    text = re.sub(r"(</summary>)(.*?)(</details>)", r"\1\n\n\2\n\n\3", text, flags=re.S)
    names = book.public.keys() - book.words.keys() if path.parent.name == "docs" else book.linked
    pages = {name: home for name, home in book.modules.items() if home != path and name not in book.words}
    def linked(m):
        if m[1] in names: return link(m[1], book)
        return f"[`{m[1]}`]({relpath(pages[m[1]], path.parent)})" if m[1] in pages else m[0]
    pieces = re.split(r"(^```.*?^```|^#.*?$|\[[^\]\n]*\]\([^)\n]*\))", text, flags=re.M | re.S)
    pieces[::2] = [re.sub(r"(?<![`\w}])`(\w+)`(?!`)", linked, piece) for piece in pieces[::2]]
    return "".join(pieces)


def plain(text):
    "A docstring or comment as Markdown: what is not in backticks is meant literally."
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = [re.sub(r"([\\*_\[\]<>$|{}#~^])", r"\\\1", piece) for piece in pieces[::2]]
    return "".join(pieces).replace("|", r"\|").replace(r"\\|", r"\|")


def row(*cells): return f"| {' | '.join(cell.replace(chr(10), ' ') for cell in cells)} |"


def arguments_table(entry):
    "Arguments and what comes back, as lines of a Markdown table; empty where there are none."
    rows = [row(", ".join(f"`{n}`" for n in names), f"`` {default} ``" if default else "", plain(comment))
            for names, default, comment in entry.arguments]
    if entry.returns: rows.append(row("*returns*", "", plain(entry.returns)))
    return ["| | default | |", "|---|---|---|", *rows, ""] if rows else []


def entry_text(entry, module, fence=6):
    "One entry as a Sphinx directive in MyST Markdown; its methods are entries within it."
    mark = ":" * fence
    head = [f"{mark}{{py:{entry.kind}}} {entry.name}{entry.signature}"]
    if fence == 6: head.append(f":module: probunlearn.{module}")
    members = [entry_text(m, module, fence - 1) for m in entry.members]
    return "\n".join([*head, "", plain(entry.doc), "", *arguments_table(entry), *members, mark, ""])


def frozen(outputs):
    "Outputs for a page without a kernel: of a widget stays the HTML that it was stored with."
    for output in outputs:
        data = output.get("data", {})
        if data.pop(WIDGET, None):
            if "text/html" not in data: continue
            note = "<p>As it was left; it moves when the notebook runs.</p>"
            data["text/html"] = f"<div class='frozen'>{''.join(data['text/html'])}{note}</div>"
        yield nbformat.from_dict(output)


def is_imports(source): return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)


def page_cells(path, book):
    "The cells of one page."
    module = next((name for name, home in book.modules.items() if home == path), None)
    for cell in book.cells[path]:
        source = (cell.source or "").strip()
        if not source or carries(cell, "default_exp", "exporti"): continue
        if cell.cell_type == "markdown": yield new_markdown_cell(prose(cell.source, book, path))
        elif is_export(cell):
            named = list(entries(source, book.words))
            if named: yield new_markdown_cell("\n".join(entry_text(e, module) for e in named))
            if not is_imports(source): yield new_code_cell(source, metadata=dict(tags=["hide-input"]))
        elif cell.cell_type == "code": yield new_code_cell(source, outputs=list(frozen(cell.get("outputs", []))))


def page(path, book):
    "One notebook as MyST-NB takes it."
    nb = nbformat.v4.new_notebook(metadata=dict(language_info=dict(name="python", pygments_lexer="ipython3")))
    nb.cells = list(page_cells(path, book))
    for i, cell in enumerate(nb.cells): cell.id = f"c{i}"
    return nb


def caption(folder): return folder.name.replace("_", " ")


def sections():
    "Caption and folder of each group of pages, as the sidebar shows them: the lessons first, then the parts."
    yield "Lessons", NBS/"tutorials"
    for folder in parts(): yield caption(folder), folder
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
        if folder.name == "tutorials":
            names = [f"{title(p, i)} <{name}>" for i, (p, name) in enumerate(zip(pages, names), 1)]
        yield "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```"])


def name_rows(names, book):
    "A table of public names with what each is."
    rows = [row(link(name, book), plain(book.public[name][1].doc)) for name in names]
    return ["| name | what it is |", "|---|---|", *rows, ""]


def names_table(book):
    "Every public name with its promise: first what one types, then all others, by part and by module."
    yield "## What you type\n\nThe package itself offers these: `from probunlearn import mean_bound`.\n"
    offered = [name for modules in typed().values() for names in modules.values() for name in names]
    for part, modules in typed().items():
        names = [name for found in modules.values() for name in found if name in book.public]
        if names: yield "\n".join([f"### {part.capitalize()}", "", *name_rows(names, book)])
    yield "## All others\n\nThese come from their module: `from probunlearn.memory import auc_bound`.\n"
    for folder in parts():
        yield f"### {caption(folder)}\n"
        for module in [name for name, path in book.modules.items() if path.parent == folder]:
            names = [name for name, (home, _) in book.public.items() if home == module and name not in offered]
            if names: yield "\n".join([f"#### {module}", "", *name_rows(names, book)])


def stage(out):
    "Write every page under `out`."
    book = read_book()
    shutil.copytree(NBS/"docs"/"images", out/"docs"/"images")
    for path in book.cells:
        nb, target = page(path, book), out/path.relative_to(NBS)
        if path.name == "index.ipynb":
            nb.cells += [new_markdown_cell(toc, id=f"toc{i}") for i, toc in enumerate(sidebar())]
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, target)
    for path in (NBS/"docs").glob("*.md"):
        text = prose(path.read_text(encoding="utf-8"), book, path)
        if path.name == "api.md": text = "\n".join([text, *names_table(book)])
        (out/"docs"/path.name).write_text(text, encoding="utf-8")


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
        loaded = attrs.get("rel") in ("stylesheet", "icon", "shortcut icon", "preload")
        if tag == "link" and attrs.get("href") and loaded: self.loads.append(attrs["href"])


def leads_somewhere(url, path, pages):
    "Whether a link on the page at `path` finds its file and its anchor."
    parts = urlparse(url)
    target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir(): target /= "index.html"
    if not target.is_file(): return False
    return target not in pages or unquote(parts.fragment) in pages[target].anchors


def broken_links(site):
    "Links of the built pages under `site` that lead nowhere, and files that a page would load from somewhere else."
    pages = {path.resolve(): Links(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, found in pages.items():
        name = path.relative_to(site.resolve())
        for url in found.links + found.loads:
            parts = urlparse(url)
            if parts.scheme or parts.netloc:
                if url in found.loads and parts.scheme != "data": yield f"{name} loads {url} from elsewhere"
            elif not leads_somewhere(url, path, pages): yield f"{name} links to {url}"


def main(out=ROOT/"_docs"):
    from sphinx.cmd.build import main as sphinx
    work = ROOT/"_proc"
    shutil.rmtree(work, ignore_errors=True)
    stage(work/"pages")
    how = ["-W", "--keep-going", "-q", "-c", str(ROOT/"tools"), "-d", str(work/"doctrees")]
    if code := sphinx([*how, str(work/"pages"), str(work/"site")]): return code
    lost = list(broken_links(work/"site"))
    if lost: return "\n".join(lost)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(work/"site", out)
    print(f"{len(list(Path(out).rglob('*.html')))} pages in {relpath(out)}: every internal link leads somewhere")


if __name__ == "__main__": sys.exit(main(*map(Path, sys.argv[1:])))
