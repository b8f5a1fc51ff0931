"""How Sphinx builds these pages: Markdown (MyST), the furo theme, docstrings in Google's style."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from generated import fill_in

from streamsoup import __version__

project = "streamsoup"
author = "the streamsoup authors"
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"streamsoup {__version__}"
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
autodoc_type_aliases = {
    name: name for name in ("AnyCoefficients", "AnyIngredient", "AnyRule", "AnyTask", "Given")
}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "code"  # docstrings say `name` as Markdown does
python_use_unqualified_type_names = True
smartquotes = False  # options begin with two hyphens


def setup(app: Any) -> None:
    """Fill in the generated parts of pages as they are read."""

    def read(_: Any, page: str, source: list[str]) -> None:
        source[0] = fill_in(source[0])

    def escape(*given: Any) -> None:
        lines = given[-1]
        lines[:] = [line.replace("|", "\\|") for line in lines]  # absolute values, no substitutions

    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", escape, priority=900)
