"""Sphinx configuration."""

project = "automodel_fn"
author = "The automodel_fn authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "automodel_fn"
exclude_patterns = ["_build"]
autodoc_typehints = "description"
