"""Sphinx: python -m sphinx -W docs docs/_build, after pip install ".[docs]"."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tree is documented, not an installed copy

project = "supermix-transforms"
release = version = installed("supermix-transforms")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = project
exclude_patterns = ["_build"]
default_role = "py:obj"  # `Name` in docstrings
nitpicky = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_rtype = False
add_module_names = False
