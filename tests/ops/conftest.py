import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

START = """
import sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "`torch.jit.script_method`", DeprecationWarning)
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
"""
END = """
dist.barrier()
dist.destroy_process_group()
print("done")
"""


@pytest.fixture
def on_two_ranks(tmp_path):
    def run(source):
        command = [sys.executable, "-c", START + source + END]
        running = [
            subprocess.Popen(
                [*command, str(rank), str(tmp_path / "store")],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
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
            assert out.endswith("done\n")

    return run


@pytest.fixture
def gloo():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def graphs():
    class Recording:
        def __init__(self):
            self.graphs = []

        def __call__(self, graph, example_inputs):
            self.graphs.append(graph)
            return graph.forward

        @property
        def targets(self):
            return [{str(n.target) for n in g.graph.nodes} for g in self.graphs]

    torch._dynamo.reset()
    yield Recording()
    torch._dynamo.reset()
