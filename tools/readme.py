"""README.md is nbs/index.ipynb as text: python tools/readme.py"""
import posixpath
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")     # a relative link or picture


def shown(output):
    "The text of one cell output as Markdown; pictures and warnings are left out."
    data = output.get("data", {})
    if "text/markdown" in data: return data["text/markdown"]
    if "image/png" in data: return ""
    text = output.get("text", "") if output.get("name") == "stdout" else data.get("text/plain", "")
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def markdown(cell):
    "One cell as Markdown."
    if cell.cell_type == "markdown": return LINK.sub(lambda m: f"]({posixpath.normpath('nbs/' + m[1])})", cell.source)
    lines = cell.source.splitlines()
    if cell.cell_type != "code" or "#| hide" in lines: return ""
    source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    if not source: return ""
    return "\n\n".join(filter(None, [f"```python\n{source}\n```", *map(shown, cell.outputs)]))


def readme():
    "The visible part of nbs/index.ipynb."
    cells = nbformat.read(ROOT/"nbs"/"index.ipynb", as_version=4).cells
    return "\n\n".join(filter(None, map(markdown, cells))) + "\n"


if __name__ == "__main__": (ROOT/"README.md").write_text(readme(), encoding="utf-8")
