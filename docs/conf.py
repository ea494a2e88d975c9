from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import automodel_fn

project = "automodel_fn"
author = "The automodel_fn authors"
copyright = author
release = version = automodel_fn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
default_role = "code"
nitpicky = False

html_theme = "furo"
html_title = f"automodel_fn {release}"
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
myst_heading_anchors = 3


class CommandLine(SphinxDirective):
    """Every command of automodel-fn with its options, from the program itself."""

    def run(self) -> list[nodes.Node]:
        from typer.main import get_command

        from automodel_fn.cli._app import app

        root = nodes.container()
        lines = StringList()
        for line in _command_lines(get_command(app)):
            lines.append(line, "command line")
        self.state.nested_parse(lines, self.content_offset, root)
        return root.children


def _command_lines(group):
    for name, command in group.commands.items():
        yield from (f"**automodel-fn {name}**", "")
        for paragraph in (command.help or "").split("\n\n"):
            yield from (" ".join(paragraph.split()), "")
        for parameter in command.params:
            yield _heading(parameter)
            yield from (f"    {_text(parameter)}", "")


def _heading(parameter):
    if parameter.param_type_name == "argument":
        return f"``{parameter.name.upper()}``"
    return ", ".join(f"``{name}``" for name in parameter.opts)


def _text(parameter):
    text = getattr(parameter, "help", None) or ""
    default = parameter.default
    is_shown = getattr(parameter, "show_default", True) and isinstance(default, str | int | float)
    return f"{text} Default: ``{default}``." if is_shown and default is not False else text


def setup(app):
    app.add_directive("command-line", CommandLine)
