"""What holds on two ranks. The claims are run once a file, by `torchrun` as its users do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).parent / "ranks"
WORLD = 2


def _claims(file):
    lines = (RANKS / f"{file}.py").read_text("utf-8").splitlines()
    return [line[4:].partition("(")[0] for line in lines if line.startswith("def claim_")]


CLAIMS = [(file, claim) for file in ("fsdp", "tensor_parallel") for claim in _claims(file)]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    found = {}

    def run(file):
        if file not in found:
            folder = tmp_path_factory.mktemp(file)
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
            subprocess.run(
                [sys.executable, *torchrun, str(RANKS), file, str(folder)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=True,
                timeout=300,
            )
            texts = [(folder / f"{rank}.json").read_text("utf-8") for rank in range(WORLD)]
            found[file] = [json.loads(text) for text in texts]
        return found[file]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("file", "claim"), CLAIMS, ids=[claim for _, claim in CLAIMS])
def test_on_two_ranks(said, file, claim):
    assert [rank.get(claim, "not reached") for rank in said(file)] == ["holds"] * WORLD
