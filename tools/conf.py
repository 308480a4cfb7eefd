"""How Sphinx builds the pages that build_docs.py has staged. No page loads anything from another site."""
import re
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

_facts = ConfigParser()
_facts.read(Path(__file__).parent.parent/"settings.ini")
_facts = _facts["DEFAULT"]

project = _facts["title"]
author = _facts["author"]
copyright = _facts["copyright"]
release = _facts["version"]
extensions = ["myst_nb"]
nb_execution_mode = "off"                       # outputs are those of the committed notebooks
nb_code_prompt_show, nb_code_prompt_hide = "Source", "Source"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_dmath_double_inline = True                 # $$ … $$ within a paragraph, as in Jupyter
suppress_warnings = ["myst.header"]             # a lesson may step from # to ###
add_module_names = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_favicon = "_static/icon.svg"
html_css_files = ["docs.css"]
html_copy_source = html_show_sourcelink = False
html_math_renderer = "mathml"
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "github-dark"


def _mathml(self, node):
    "Formulas as MathML, which browsers draw themselves: no script, nothing to download."
    tex = re.sub(r"\\([bB]ig+)(?![a-zA-Z])", r"\\\1l", node.astext())       # docutils' spellings
    tex = tex.replace(r"\dots", r"\ldots")
    is_block = isinstance(node, nodes.math_block)
    try: formula = str(tex2mathml(tex, as_block=is_block))
    except MathError as error: logging.getLogger(__name__).warning("formula %r: %s", tex, error, location=node)
    else: self.body.append(f"<div class='formula'>{formula}</div>" if is_block else formula)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (_mathml, None), (_mathml, None))
