"""Sphinx configuration: `python -m sphinx -W -b html docs docs/_build/html`. Needs the `docs` extra, not a network."""

from __future__ import annotations

import importlib
import pydoc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "gpt2-jax"
author = "The gpt2-jax authors"
copyright = "2026, the gpt2-jax authors"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# Docstrings: Google's sections; single backticks hold code, as in the source.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # a class that two pages show, under two names
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 90

# Notebooks are executed by every build, and an error in a cell fails it.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_title = "gpt2-jax"
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "article_header_end": [],
    "navbar_persistent": [],
}
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_copy_source = False

# The packages whose `__all__` is the public interface. Each has a page in docs/api.
PUBLIC = ["", "checkpoints", "data", "evaluate", "generation", "inspection", "release", "research", "training"]


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of each public name that no page documents; with -W the build fails."""
    from sphinx.util import logging

    documented = [pydoc.locate(name) for name in env.domains["py"].data["objects"]]
    for room in PUBLIC:
        module = importlib.import_module(f"gpt2_jax.{room}" if room else "gpt2_jax")
        for name in getattr(module, "__all__", []):
            if not any(getattr(module, name) is value for value in documented):
                logging.getLogger(__name__).warning("no page of docs/api documents %s.%s", module.__name__, name)


def setup(app: Sphinx) -> None:
    """Connect the check of public names, and head the attributes of a class "Attributes" in place of "Variables"."""
    from sphinx.domains.python import PyObject

    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("env-check-consistency", check_public_names)
