"""What several areas' tests need: process groups, quiet models, Transformer Engine's stand-ins."""

import logging
import os
import signal
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

# As for the properties, so that one profile says how long both take.
slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large]
common = {"deadline": None, "suppress_health_check": slow_is_fine}
settings.register_profile("dev", max_examples=25, **common)
settings.register_profile("ci", max_examples=200, derandomize=True, database=None, **common)
settings.register_profile("nightly", max_examples=2000, print_blob=True, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

START = """
import os, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "`torch.jit.script_method`", DeprecationWarning)
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
"""
# A process may abort in its own end, in threads of gloo: that is not part of a test.
END = """
dist.barrier()
dist.destroy_process_group()
print("done", flush=True)
os._exit(0)
"""


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_interrupts():
    """Tests press Ctrl-C, which a shell has processes ignore that it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def quiet_transformers():
    """Small configs do not fit the defaults beside them, and transformers says so."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def one_thread():
    """The models are so small that threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def installed_stand_ins(monkeypatch):
    """Stand-ins in the place of Transformer Engine."""
    from automodel_fn.te import _record
    from automodel_fn.testing import te_stand_ins

    record = te_stand_ins()
    module = types.ModuleType("transformer_engine.pytorch")
    vars(module).update({cls.__name__: cls for _, cls in record.items()})
    package = types.ModuleType("transformer_engine")
    package.pytorch = module
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    remembered = dict(_record.aware)
    yield record
    _record.aware.clear()
    _record.aware.update(remembered)


@pytest.fixture
def gloo():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def in_two_processes(tmp_path):
    """Runs source in two processes, given a rank and a file to meet at; returns what each says."""

    def run(source, environment):
        running = [
            subprocess.Popen(
                [sys.executable, "-c", source, str(rank), str(tmp_path / "store")],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            said = [process.communicate(timeout=240) for process in running]
        finally:
            for process in running:
                process.kill()
        for process, (out, err) in zip(running, said, strict=True):
            assert process.returncode == 0, err
            assert out.splitlines()[-1] == "done"
        return [out.splitlines()[:-1] for out, _ in said]

    return run


@pytest.fixture
def on_two_ranks(in_two_processes):
    """Runs source in two processes that have `rank`, `mesh`, `torch` and `dist`."""

    def run(source):
        assert in_two_processes(START + source + END, {"OMP_NUM_THREADS": "1"}) == [[], []]

    return run
