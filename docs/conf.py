"""Sphinx: python -m sphinx -W docs docs/_build, after pip install ".[docs]"."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the tree is documented, not an installed copy

project = "supermix-transforms"
release = version = installed("supermix-transforms")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
html_title = project
html_show_copyright = False
html_show_sphinx = False
exclude_patterns = ["_build", "gallery/*.ipynb", "gallery/*.py"]
default_role = "py:obj"  # `Name` in docstrings
nitpicky = False

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("scrapers.figures", "matplotlib"),
    "show_memory": False,
    "write_computation_times": False,
    "abort_on_example_error": True,
    "download_all_examples": False,
}
