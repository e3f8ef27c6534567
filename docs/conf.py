"""Configuration of the documentation site: Sphinx, Markdown through MyST, the API reference from docstrings."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tree's package, not the one that is installed

project = "async-ckpt"
release = version = version_of(project)
author = "the async-ckpt authors"
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "changes", "decisions/0000-template.md"]

html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes stand with their class, once
