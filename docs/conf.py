"""The documentation as a site: `make docs` writes build/docs/index.html, which needs no network.

Its reference is generated from the program: `reference_pages.py` here.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import reference_pages  # noqa: E402

import crcjax  # noqa: E402

project = "crcjax"
version = release = crcjax.__version__
copyright = "the authors of crcjax; research software, not a medical device"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["figures"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
# Options keep their two hyphens.
smartquotes = False
# Code blocks without a language are commands and files.
highlight_language = "none"

add_module_names = False
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"crcjax {release}"
# The pages' sources are Markdown of the repository.
html_show_sourcelink = html_copy_source = False

reference_pages.write(HERE / "reference")
