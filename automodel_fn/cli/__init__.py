"""The command line, `automodel-fn`."""

from automodel_fn.cli._app import main

__all__ = ["main"]
