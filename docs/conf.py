"""How Sphinx builds the site of these pages: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer

sys.path.insert(0, str(Path(__file__).parent))

from reference_tables import write

from qinvert.version import __version__

project = "qinvert"
author = "the authors of qinvert"
version = release = __version__
extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_click",
    "matplotlib.sphinxext.plot_directive",
]
html_theme = "furo"
html_title = f"qinvert {version}"
exclude_patterns = ["reference/tables"]
myst_heading_anchors = 4
default_role = "py:obj"
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"
numpydoc_show_class_members = False
plot_formats = ["svg"]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_rcparams = {"svg.hashsalt": "qinvert", "figure.autolayout": True}


def setup(app: Any) -> None:
    """Write tables from the code, and show drawings of the pages as the text that they are."""
    app.connect("builder-inited", write)
    app.add_lexer("mermaid", TextLexer)
