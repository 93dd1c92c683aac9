"""Which pictures of an example the gallery shows, beside pyplot's."""

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst


def figures(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Pictures of a `figure` that is no pyplot one: those of supermix_transforms.plots."""
    found = block_vars["example_globals"].pop("figure", None)
    if not isinstance(found, Figure):
        return ""
    path = next(block_vars["image_path_iterator"])
    found.savefig(path)
    return figure_rst([path], gallery_conf["src_dir"])
