import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from automodel_fn import is_tensor_unallocated
from automodel_fn.te._unallocated import is_tensor_abstract


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def freed_view():
    base = torch.ones(4)
    view = base[1:3]
    freed(base)
    return view


def fake(shape=(2,), device="cpu"):
    with FakeTensorMode():
        return torch.ones(shape, device=device)


def jagged(device="cpu"):
    rows = [torch.ones(2, 3, device=device), torch.ones(1, 3, device=device)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


class Plain(torch.Tensor):
    pass


WITHOUT_VALUES = {
    "meta": lambda: torch.ones(2, device="meta"),
    "a meta parameter": lambda: torch.nn.Parameter(torch.ones(2, device="meta")),
    "an empty meta tensor": lambda: torch.ones(0, device="meta"),
    "a meta tensor of a subclass": lambda: torch.ones(2, device="meta").as_subclass(Plain),
    "sparse on meta": lambda: torch.eye(2).to_sparse().to("meta"),
    "fake": fake,
    "fake on a GPU": lambda: fake(device="cuda"),
    "fake on meta": lambda: fake(device="meta"),
    "jagged on meta": lambda: jagged("meta"),
}
WITHOUT_MEMORY = {
    "an uninitialized parameter": UninitializedParameter,
    "an uninitialized buffer": UninitializedBuffer,
    "an uninitialized meta parameter": lambda: UninitializedParameter(device="meta"),
    "freed": lambda: freed(torch.ones(2)),
    "a freed parameter": lambda: torch.nn.Parameter(freed(torch.ones(2))),
    "a view of a freed tensor": freed_view,
    "a freed tensor of a subclass": lambda: freed(torch.ones(2)).as_subclass(Plain),
}
WITH_MEMORY = {
    "a tensor": lambda: torch.ones(2),
    "a scalar": lambda: torch.tensor(1.0),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "a tensor of a subclass": lambda: torch.ones(2).as_subclass(Plain),
    "empty": lambda: torch.ones(0),
    "empty in one dimension": lambda: torch.ones(0, 8),
    "an empty view": lambda: torch.ones(4)[2:2],
    "expanded": lambda: torch.ones(1).expand(8),
    "complex": lambda: torch.ones(2, dtype=torch.complex64),
    "integers": lambda: torch.arange(3),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "an empty sparse tensor": lambda: torch.zeros(2, 2).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]),
    "jagged": jagged,
    "copied on write": lambda: torch._lazy_clone(torch.ones(2)),
    "the zeros of forward mode": lambda: torch._efficientzerotensor((2,)),
    "made for inference": lambda: torch.inference_mode()(torch.ones)(2),
}


@pytest.mark.parametrize("make", WITHOUT_VALUES.values(), ids=WITHOUT_VALUES)
def test_meta_and_fake_tensors_have_neither_memory_nor_values(make):
    assert is_tensor_unallocated(make())
    assert is_tensor_abstract(make())


@pytest.mark.filterwarnings("ignore:.*prototype")
@pytest.mark.parametrize("make", WITHOUT_MEMORY.values(), ids=WITHOUT_MEMORY)
def test_what_was_freed_or_never_made_has_no_memory(make):
    # A failing assertion must not print such a tensor: that would read memory that is not there.
    answer = is_tensor_unallocated(make())
    assert answer is True


@pytest.mark.parametrize("name", ["freed", "a view of a freed tensor"])
def test_what_was_freed_is_no_tensor_of_shape_inference(name):
    answer = is_tensor_abstract(WITHOUT_MEMORY[name]())
    assert answer is False


@pytest.mark.filterwarnings("ignore:.*prototype")
@pytest.mark.parametrize("make", WITH_MEMORY.values(), ids=WITH_MEMORY)
def test_a_tensor_that_a_kernel_can_read_is_allocated(make):
    assert not is_tensor_unallocated(make())
    assert not is_tensor_abstract(make())


def test_a_fake_tensor_is_unallocated_inside_its_mode_and_outside():
    with FakeTensorMode() as mode:
        inside = torch.ones(2)
        assert is_tensor_unallocated(inside)
        assert is_tensor_unallocated(mode.from_tensor(torch.ones(2)))
    assert is_tensor_unallocated(inside)


def test_a_real_tensor_is_allocated_inside_a_fake_mode():
    real = torch.ones(2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not is_tensor_unallocated(real)


def test_asking_copies_nothing_that_is_copied_on_write():
    copy = torch._lazy_clone(torch.ones(2))
    assert not is_tensor_unallocated(copy)
    assert torch._C._is_cow_tensor(copy)


@pytest.fixture
def mesh(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_a_dtensor_is_judged_by_its_local_tensor(mesh, placement):
    def distributed(local):
        return DTensor.from_local(local, mesh, [placement], run_check=False)

    assert not is_tensor_unallocated(distributed(torch.ones(2, 3)))
    assert not is_tensor_unallocated(torch.nn.Parameter(distributed(torch.ones(2, 3))))
    assert not is_tensor_unallocated(distributed(torch.ones(0, 3)))
    assert is_tensor_unallocated(distributed(torch.ones(2, 3, device="meta")))
    answer = is_tensor_unallocated(distributed(freed(torch.ones(2, 3))))
    assert answer is True
    with FakeTensorMode():
        local = torch.ones(2, 3)
    assert is_tensor_unallocated(distributed(local))


def judged(transform, tensor):
    seen = []

    def function(x):
        seen.append(is_tensor_unallocated(x))
        return x.sum()

    transform(function)(tensor)
    return seen


def forward_mode(function):
    return lambda x: torch.func.jvp(function, (x,), (x,))


TRANSFORMS = {
    "vmap": torch.func.vmap,
    "grad": torch.func.grad,
    "jvp": forward_mode,
    "functionalize": torch.func.functionalize,
    "vmap of grad": lambda function: torch.func.vmap(torch.func.grad(function)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_tensor_inside_a_transform_is_judged_by_what_it_wraps(transform):
    values = torch.arange(3.0) if transform is not TRANSFORMS["vmap of grad"] else torch.ones(2, 3)
    assert judged(transform, values) == [False]


@pytest.mark.parametrize("name", ["vmap", "grad"])
def test_a_meta_tensor_inside_a_transform_is_unallocated(name):
    assert judged(TRANSFORMS[name], torch.ones(3, device="meta")) == [True]


# What a model does with the answer: an unwritten tensor in the place of its result.


class Asking(torch.nn.Module):
    def forward(self, x):
        return torch.empty_like(x) if is_tensor_unallocated(x) else x.sin()


def operators(graph):
    return {
        getattr(node.target, "__name__", str(node.target)).partition(".")[0]
        for node in graph.nodes
        if node.op in ("call_function", "call_method")
    }


def test_a_compiled_graph_has_the_real_branch():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.graph)
        return graph.forward

    torch._dynamo.reset()
    out = torch.compile(Asking(), fullgraph=True, backend=backend)(torch.ones(2))
    torch._dynamo.reset()
    assert torch.equal(out, torch.ones(2).sin())
    assert [operators(graph) for graph in graphs] == [{"sin"}]


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_graph_has_the_real_branch(strict):
    exported = torch.export.export(Asking(), (torch.ones(2),), strict=strict)
    assert operators(exported.graph) == {"sin"}


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_a_traced_graph_has_the_real_branch(tracing_mode, pre_dispatch):
    trace = make_fx(Asking(), tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)
    assert operators(trace(torch.ones(2)).graph) == {"sin"}


def test_a_graph_that_autograd_is_compiled_to_has_the_real_branch():
    from functorch.compile import aot_function

    graphs = []

    def compiler(graph, inputs):
        graphs.append(operators(graph.graph))
        return graph

    aot_function(Asking(), fw_compiler=compiler)(torch.ones(2, requires_grad=True))
    assert graphs == [{"sin"}]


def test_a_meta_tensor_is_unallocated_in_compiled_code_too():
    torch._dynamo.reset()
    compiled = torch.compile(Asking(), fullgraph=True, backend="eager")
    assert compiled(torch.ones(2, device="meta")).device.type == "meta"
    torch._dynamo.reset()
