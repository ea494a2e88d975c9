# Two GPUs, NCCL: run by pytest, which starts one process a GPU.
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
START = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from automodel_fn import StepContext, TEFp8Config, accumulate, cache_counts, gradient_sync
from automodel_fn import patch_te, step_context
from automodel_fn.te._load import load_te_classes
rank = int(sys.argv[1])
torch.cuda.set_device(rank)
dist.init_process_group("nccl", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
mesh = init_device_mesh("cuda", (2,))
classes = load_te_classes()
IN, OUT, ROWS = 256, 384, 128
SPLITS = torch.tensor([ROWS, ROWS])

def sharded(field, *sizes):
    torch.manual_seed(0)
    model = getattr(classes, field)(*sizes, params_dtype=torch.bfloat16)
    return fully_shard(model, mesh=mesh)

def inputs(number):
    torch.manual_seed(7 + rank)
    return [torch.randn(2 * ROWS, IN, device="cuda", dtype=torch.bfloat16) for _ in range(number)]

def trained(model, is_cached, *more):
    for step, inp in accumulate(inputs(4), 4):
        first = step.first_microbatch if is_cached else None
        with gradient_sync(model, step), step_context(first_microbatch=first):
            with TEFp8Config("current").autocast():
                model(inp, *more).float().square().sum().backward()
    return [p.grad.full_tensor() for p in model.parameters()]

class Counting:
    'How many reductions NCCL is asked for, by wrapping the two that FSDP2 and DDP use.'
    def __init__(self):
        self.calls = 0
        self.originals = {}
    def __enter__(self):
        # Which of the first two FSDP2 calls depends on the version of PyTorch.
        names = ("reduce_scatter_single", "reduce_scatter_tensor", "all_reduce")
        for name in (name for name in names if hasattr(dist, name)):
            original = self.originals[name] = getattr(dist, name)
            def counted(*args, original=original, **kwargs):
                self.calls += 1
                return original(*args, **kwargs)
            setattr(dist, name, counted)
        return self
    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)
"""
END = """
dist.barrier()
dist.destroy_process_group()
print("done", flush=True)
"""


@pytest.fixture
def on_two_gpus(in_two_processes):
    return lambda source: in_two_processes(START + source + END, {"NCCL_NVLS_ENABLE": "0"})


def test_grouped_linear_agrees_with_and_without_caching(on_two_gpus):
    print(
        on_two_gpus("""
with patch_te():
    plain = trained(sharded("grouped_linear", 2, IN, OUT), False, SPLITS)
    model = sharded("grouped_linear", 2, IN, OUT)
    torch.cuda.synchronize()
    cached = trained(model, True, SPLITS)
for one, other in zip(plain, cached, strict=True):
    assert torch.equal(one, other)
counts = cache_counts(model)
assert counts.refreshed == 0, counts
assert model._fp8_workspaces, "it keeps its unsharded FP8 weights"
print("kept by GroupedLinear:", sorted(model._fp8_workspaces), counts)
""")
    )


def test_a_sharded_grouped_linear_keeps_one_byte_a_value_for_each_of_two_layouts(on_two_gpus):
    on_two_gpus("""
model = sharded("grouped_linear", 2, IN, OUT)
with patch_te():
    trained(model, True, SPLITS)
kept = [data for weight in model._fp8_workspaces.values() for data in weight.get_data_tensors()]
assert sum(data.nbytes for data in kept if data is not None) == 2 * (2 * IN * OUT), [
    None if data is None else (data.dtype, tuple(data.shape)) for data in kept
]
""")


def test_transformer_engine_turns_its_cache_off_in_a_sharded_linear(on_two_gpus):
    on_two_gpus("""
with patch_te():
    plain = trained(sharded("linear", IN, OUT), False)
    model = sharded("linear", IN, OUT)
    cached = trained(model, True)
assert all(map(torch.equal, plain, cached))
assert not model._fp8_workspaces
""")


def test_an_optimizer_step_of_a_sharded_grouped_linear_is_noticed(on_two_gpus):
    on_two_gpus("""
model = sharded("grouped_linear", 2, IN, OUT)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
inp = inputs(1)[0]
def run(first):
    with step_context(first_microbatch=first), TEFp8Config("current").autocast(), torch.no_grad():
        return model(inp, SPLITS)
with patch_te():
    trained(model, True, SPLITS)
    run(True)
    optimizer.step()
    assert torch.equal(run(False), run(None))
""")


def test_no_gradient_is_reduced_before_optim_step(on_two_gpus):
    on_two_gpus("""
from torch.nn.parallel import DistributedDataParallel
model = fully_shard(torch.nn.Linear(IN, OUT, device="cuda"), mesh=mesh)
seen = []
with Counting() as counting:
    for step, inp in accumulate(inputs(4), 4):
        with gradient_sync(model, step):
            model(inp.float()).square().sum().backward()
        torch.cuda.synchronize()
        seen.append(counting.calls)
assert seen[:3] == [0, 0, 0], seen
assert seen[3] > 0, seen
ddp = DistributedDataParallel(torch.nn.Linear(IN, OUT, device="cuda"))
reduced = []
def hook(state, bucket):
    reduced.append(1)
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])
ddp.register_comm_hook(None, hook)
seen = []
for step, inp in accumulate(inputs(4), 4):
    with gradient_sync(ddp, step):
        ddp(inp.float()).square().sum().backward()
    seen.append(len(reduced))
assert seen == [0, 0, 0, 1], seen
""")
