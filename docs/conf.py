"""Sphinx: the pages in this folder, and those that `pages.py` makes from the sources at every build."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from pages import write_pages  # noqa: E402
from sphinx.ext.napoleon.docstring import GoogleDocstring  # noqa: E402

write_pages(HERE / "generated")

project = "lora_lab"
author = "the lora_lab authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "lora_lab"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
smartquotes = False  # they would make a quotation mark of the prime in W'
pygments_dark_style = "github-dark"
highlight_language = "text"
default_role = "code"
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Napoleon takes a field's docstring with a colon in it for "type: description"; ours are plain sentences.
GoogleDocstring._parse_attribute_docstring = lambda self: list(self._lines)

# Strict: a reference to something of lora_lab's that does not exist is a warning, and the build treats
# warnings as errors. Other projects' names are not looked up: the build needs no network.
nitpicky = True
# Our types that are not public names also occur in signatures.
nitpick_ignore_regex = [(r"py:.*", r"(?!lora_lab).*"), (r"py:class", r"lora_lab\.\w+\..*")]
