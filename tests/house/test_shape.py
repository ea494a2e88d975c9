from __future__ import annotations

import ast
import re
from pathlib import Path

MAX_LINES_OF_A_FILE = 250
MAX_LINES_OF_A_FUNCTION = 60
TESTS = Path(__file__).resolve().parents[1]
# Folders of tests that are about all areas or about none.
ACROSS = {"docs", "gpu", "house"}


def _num_lines(function):
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def _areas(sources):
    return {source.room for source in sources if source.is_door} - {"__init__"}


def test_no_file_is_long(sources):
    long = [
        f"automodel_fn/{source.path}: {len(source.text.splitlines())} lines"
        for source in sources
        if len(source.text.splitlines()) > MAX_LINES_OF_A_FILE
    ]

    assert long == []


def test_no_function_is_long(sources):
    long = [
        f"automodel_fn/{source.path}:{node.lineno} {node.name}: {_num_lines(node)} lines"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if _num_lines(node) > MAX_LINES_OF_A_FUNCTION
    ]

    assert long == []


def test_nothing_is_left_to_do(sources):
    left = [
        f"automodel_fn/{source.path}:{number}"
        for source in sources
        for number, line in enumerate(source.text.splitlines(), 1)
        if re.search(r"\b(TODO|FIXME|XXX)\b", line)
    ]

    assert left == []


def test_every_file_says_what_it_is_for(sources):
    assert [source.path for source in sources if not ast.get_docstring(source.tree)] == []


def test_every_area_has_tests_in_a_folder_of_its_name(sources):
    without = [
        area for area in sorted(_areas(sources)) if not any((TESTS / area).glob("test_*.py"))
    ]

    assert without == []


def test_every_folder_of_tests_has_the_name_of_an_area(sources):
    folders = {file.parent.name for file in TESTS.glob("*/test_*.py")}

    assert folders - _areas(sources) - ACROSS == set()


def test_every_file_of_the_ground_floor_has_a_file_of_tests(sources):
    ground = {source.room for source in sources if "/" not in source.path} - {"__init__"}

    assert {f"test_{room}.py" for room in ground} == {file.name for file in TESTS.glob("test_*.py")}
