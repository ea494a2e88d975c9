from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = (
    "transformers",
    "transformer_engine",
    "hypothesis",
    "matplotlib",
    "rich",
    "typer",
    "cattrs",
    "yaml",
    "safetensors",
)
# The command line is made of these two.
CLI = ("rich", "typer")


def _loaded(package, statement):
    code = f"{statement}\nimport sys\nprint(*sorted(m for m in sys.modules if '.' not in m))"
    path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(ran.stdout.split())


@pytest.fixture(scope="module")
def with_torch(package):
    return _loaded(package, "import torch, torch.distributed.fsdp, attrs")


def test_importing_the_package_loads_torch_and_attrs_only(package, with_torch):
    loaded = _loaded(package, "import automodel_fn")

    assert {"automodel_fn", "torch", "attrs"} <= loaded
    assert loaded & set(HEAVY) - with_torch == set()


def test_importing_the_command_line_loads_no_heavy_package(package, with_torch):
    loaded = _loaded(package, "import automodel_fn.cli")

    assert loaded & set(HEAVY) - with_torch - set(CLI) == set()


def test_the_fixed_usages_load_no_heavy_package(package, with_torch):
    loaded = _loaded(
        package,
        "import torch\n"
        "from automodel_fn import apply, bf16, cast_plan, step_context\n"
        "model = torch.nn.Linear(2, 2)\n"
        "with step_context(first_microbatch=True):\n"
        "    model(torch.ones(1, 2))\n"
        "plan = cast_plan(model, bf16)\n"
        "apply(plan)",
    )

    assert loaded & set(HEAVY) - with_torch == set()
