"""Plans and reports for a person: tables for a terminal, HTML for a browser. Pure functions."""

from automodel_fn.render._bars import Panel, bars_svg
from automodel_fn.render._benchmark import BenchmarkLine, benchmark_tables
from automodel_fn.render._benchmark_markdown import benchmark_markdown
from automodel_fn.render._curve import curve_svg
from automodel_fn.render._groups import Group, grouped, size_text, summary
from automodel_fn.render._page import bullet_list, page, section, text_table
from automodel_fn.render._plan_html import plan_html, plan_sections
from automodel_fn.render._swap_table import swap_table
from automodel_fn.render._table import plan_table, simple_table

__all__ = [
    "BenchmarkLine",
    "Group",
    "Panel",
    "bars_svg",
    "benchmark_markdown",
    "benchmark_tables",
    "bullet_list",
    "curve_svg",
    "grouped",
    "page",
    "plan_html",
    "plan_sections",
    "plan_table",
    "section",
    "simple_table",
    "size_text",
    "summary",
    "swap_table",
    "text_table",
]
