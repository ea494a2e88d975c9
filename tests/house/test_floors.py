from __future__ import annotations

import ast
from pathlib import PurePosixPath

import pytest

FLOORS = (
    ("errors", "fqn", "dtypes", "handles", "plans"),
    ("step", "cast", "backend", "ops"),
    ("nn", "te", "render"),
    ("build", "convert"),
    ("testing", "compat"),
    ("cli", "bench"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# On one floor no room knows another, but for the command that runs the benchmarks.
NEIGHBOURS = {("cli", "bench")}


def _is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _imports(tree):
    pending = [tree]
    while pending:
        node = pending.pop()
        if _is_type_checking(node):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        pending.extend(ast.iter_child_nodes(node))


def _targets(node, source, modules):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] == "automodel_fn"]
    base = node.module or ""
    if node.level:
        folder = PurePosixPath("automodel_fn", source.path).parents[node.level - 1]
        base = ".".join([*folder.parts, *([base] if base else [])])
    if base.split(".")[0] != "automodel_fn":
        return []
    inner = [f"{base}.{alias.name}" for alias in node.names]
    return [name if name in modules else base for name in inner]


@pytest.fixture(scope="module")
def edges(sources):
    modules = {source.module for source in sources}
    found = []
    for source in sources:
        found += [
            (source, f"automodel_fn/{source.path}:{node.lineno}", target)
            for node in _imports(source.tree)
            for target in _targets(node, source, modules)
        ]
    return found


def _room(target):
    return target.split(".")[1] if "." in target else ""


def test_every_room_stands_on_a_floor(sources):
    rooms = {source.room for source in sources} - {"__init__"}

    assert rooms - FLOOR_OF.keys() == set()


def test_imports_only_go_down(edges):
    wrong = []
    for source, place, target in edges:
        ours, theirs = source.room, _room(target)
        if ours == "__init__" or not theirs or ours == theirs or (ours, theirs) in NEIGHBOURS:
            continue
        is_ground = FLOOR_OF[ours] == FLOOR_OF[theirs] == 0
        if not is_ground and FLOOR_OF[theirs] >= FLOOR_OF[ours]:
            wrong.append(f"{place} imports {target}")

    assert wrong == []


def test_nobody_inside_goes_through_a_door(edges, sources):
    doors = {source.module for source in sources if source.is_door}
    wrong = [
        f"{place} imports {target}"
        for source, place, target in edges
        if target in doors and source.path != "__init__.py"
    ]

    assert wrong == []


def test_a_door_opens_to_its_own_room_only(edges):
    wrong = [
        f"{place} imports {target}"
        for source, place, target in edges
        if source.is_door
        and source.room not in ("__init__", _room(target))
        and (source.room, target) != ("testing", "automodel_fn.errors")
    ]

    assert wrong == []


def test_no_two_files_import_each_other_in_a_circle(edges):
    below = {}
    for source, _, target in edges:
        below.setdefault(source.module, set()).add(target)
    done, walked = set(), []

    def visit(module):
        if module in walked:
            pytest.fail(" -> ".join([*walked[walked.index(module) :], module]))
        if module in done:
            return
        walked.append(module)
        for target in sorted(below.get(module, ())):
            visit(target)
        walked.pop()
        done.add(module)

    for module in sorted(below):
        visit(module)


def test_files_inside_a_room_are_private(sources):
    named = [source.path for source in sources if "/" in source.path and not source.is_door]

    assert [path for path in named if not path.rpartition("/")[2].startswith("_")] == [
        path for path in named if path == "compat/nemo.py"
    ]
