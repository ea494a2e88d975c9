from __future__ import annotations

import ast
from fnmatch import fnmatchcase

import pytest

EFFECTFUL = (
    "cli/*",
    "bench/*",
    "build/*",
    "convert/*",
    "te/*",
    "step/_ambient.py",
    "step/_autograd.py",
    "step/_base.py",
    "step/_bind.py",
    "step/_carrier.py",
    "step/_checkpointing.py",
    "step/_freshness.py",
    "step/_sync.py",
    "cast/_apply.py",
    "cast/_boundaries.py",
    "cast/_checkpoint.py",
    "cast/_dtensors.py",
    "cast/_exchange.py",
    "cast/_fsdp.py",
    "cast/_shard.py",
    "cast/_sharded.py",
    "cast/_snapshot.py",
    "cast/_temporary.py",
    "backend/_fp8.py",
    "backend/_probe.py",
    # These change copies of a model: to make them, and to see what a plan makes of a changed one.
    "cast/_promotion.py",
    "testing/_laws_plan.py",
    "testing/_twin.py",
)
STATE = {"data", "_buffers", "_modules", "_parameters", "forward"}
CALLS = {"print", "open", "ContextVar"}


@pytest.fixture(scope="module")
def pure(sources):
    return [s for s in sources if not any(fnmatchcase(s.path, known) for known in EFFECTFUL)]


def _written(node):
    if isinstance(node, ast.Assign | ast.Delete):
        yield from node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For):
        yield node.target
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        yield node.optional_vars
    elif isinstance(node, ast.NamedExpr):
        yield node.target


def _attributes(target):
    if isinstance(target, ast.Tuple | ast.List):
        for item in target.elts:
            yield from _attributes(item)
    elif isinstance(target, ast.Starred | ast.Subscript):
        yield from _attributes(target.value)
    elif isinstance(target, ast.Attribute):
        yield target.attr


def _set_by_name(node):
    if not isinstance(node, ast.Call):
        return
    called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    if called in ("setattr", "delattr", "__setattr__", "__delattr__"):
        for argument in node.args:
            if isinstance(argument, ast.Constant):
                yield argument.value


def _state_changes(tree):
    for node in ast.walk(tree):
        for target in _written(node):
            yield from ((target.lineno, attribute) for attribute in _attributes(target))
        yield from ((node.lineno, name) for name in _set_by_name(node))


def _calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else None
            yield node.lineno, name or getattr(node.func, "attr", "")


def test_a_pure_file_changes_no_tensor_and_no_module(pure):
    wrong = [
        f"automodel_fn/{source.path}:{line} sets {attribute}"
        for source in pure
        for line, attribute in _state_changes(source.tree)
        if attribute in STATE
    ]

    assert wrong == []


def test_a_pure_file_prints_opens_and_carries_nothing(pure):
    wrong = [
        f"automodel_fn/{source.path}:{line} calls {called}"
        for source in pure
        for line, called in _calls(source.tree)
        if called in CALLS
    ]

    assert wrong == []


def test_nothing_is_printed_below_the_command_line(sources):
    wrong = [
        f"automodel_fn/{source.path}:{line}"
        for source in sources
        if source.room not in ("cli", "bench")
        for line, called in _calls(source.tree)
        if called == "print"
    ]

    assert wrong == []


def test_data_is_assigned_in_one_file_of_casting(sources):
    found = {
        source.path
        for source in sources
        if source.room == "cast"
        for _, attribute in _state_changes(source.tree)
        if attribute == "data"
    }

    assert found == {"cast/_exchange.py"}


def test_the_ambient_step_has_one_context_variable(sources):
    found = [
        source.path
        for source in sources
        if source.room != "bench"  # there one is measured, beside ours
        for _, called in _calls(source.tree)
        if called == "ContextVar"
    ]

    assert found == ["step/_carrier.py"]


def test_no_function_rebinds_a_global(sources):
    wrong = [
        f"automodel_fn/{source.path}:{node.lineno}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Global)
    ]

    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "weight.data = x",
        "a, weight.data = x, y",
        "module._buffers['b'] = x",
        "del module._modules['m']",
        "module.forward = f",
        "setattr(module, 'forward', f)",
        "object.__setattr__(module, '_modules', {})",
        "weight.data += x",
    ],
)
def test_a_change_of_state_is_found_however_it_is_written(line):
    assert {name for _, name in _state_changes(ast.parse(line))} & STATE


@pytest.mark.parametrize("line", ["x = weight.data", "f(data=1)", "data = 1", "self.model = m"])
def test_reading_is_no_change_of_state(line):
    assert not {name for _, name in _state_changes(ast.parse(line))} & STATE
