import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from automodel_fn import ConfigError, lm_head_logits

H, V = 16, 11


def head(stored=torch.float32, **policy):
    torch.manual_seed(0)
    lm_head = nn.Linear(H, V, bias=False, dtype=stored)
    plain = lm_head.weight.detach().clone()
    mesh = init_device_mesh("cpu", (1,))
    return fully_shard(lm_head, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy)), plain


def hidden(dtype=torch.float32):
    return torch.randn(2, 5, H, generator=torch.Generator().manual_seed(1)).to(dtype)


class Model(nn.Module):
    def __init__(self, lm_head):
        super().__init__()
        self.body, self.lm_head = nn.Linear(H, H), lm_head

    def forward(self, x):
        return lm_head_logits(self.lm_head, self.body(x), output_hidden_states=True)


@pytest.mark.parametrize("compute", [torch.bfloat16, None])
def test_a_sharded_head_computes_in_the_dtype_of_its_policy(gloo, compute):
    lm_head, weight = head(param_dtype=compute, cast_forward_inputs=False)
    dtype = compute or torch.float32
    assert lm_head.weight.dtype == torch.float32
    found = lm_head_logits(lm_head, hidden(torch.float16)).logits
    expected = nn.functional.linear(hidden(torch.float16).to(dtype), weight.to(dtype))
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_a_sharded_head_inside_another_module_is_found(gloo):
    lm_head, _ = head(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    assert lm_head_logits(nn.Sequential(lm_head), hidden()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_fp32_runs_on_a_head_that_is_sharded_to_compute_in_it(gloo, stored):
    lm_head, weight = head(stored, param_dtype=torch.float32)
    x = hidden(torch.bfloat16)
    found = lm_head_logits(lm_head, x, precision="fp32").logits
    assert torch.equal(found, nn.functional.linear(x.float(), weight.float()))
    found.sum().backward()
    assert lm_head.weight.grad.dtype == stored


@pytest.mark.parametrize(
    ("stored", "policy"),
    [
        (torch.float32, {"param_dtype": torch.bfloat16}),
        (torch.bfloat16, {}),
        (torch.float32, {"output_dtype": torch.bfloat16}),
    ],
)
def test_fp32_on_a_head_that_is_sharded_to_compute_in_less_is_an_error(gloo, stored, policy):
    lm_head, _ = head(stored, **policy)
    for wanted in (lm_head, nn.Sequential(lm_head)):
        with pytest.raises(ConfigError, match=r"fully_shard\(lm_head, mp_policy=.*float32"):
            lm_head_logits(wanted, hidden(), precision="fp32")


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # of nn.Linear
def test_fully_sharded_models_see_the_tensors_of_an_output(gloo):
    lm_head, _ = head()
    model = fully_shard(Model(lm_head), mesh=init_device_mesh("cpu", (1,)))
    model(hidden()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # of nn.Linear
def test_gradients_of_a_sharded_model_that_returns_an_output_are_reduced(gloo):
    model = fully_shard(Model(nn.Linear(H, V)), mesh=init_device_mesh("cpu", (1,)))
    model(hidden()).logits.sum().backward()
    assert all(isinstance(parameter.grad, DTensor) for parameter in model.parameters())


def test_a_head_in_the_group_of_its_model_computes_in_fp32_too(gloo):
    class Whole(Model):
        def forward(self, x):
            return lm_head_logits(self.lm_head, self.body(x), precision="fp32").logits

    model = Whole(nn.Linear(H, V, bias=False))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    logits = model(hidden())
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    logits.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_parts_are_made_of_the_weight_that_fsdp2_gathers(gloo, stored, precision):
    lm_head, weight = head(stored)
    plain = nn.Linear(H, V, bias=False, dtype=stored)
    plain.weight = nn.Parameter(weight)
    x = hidden(torch.bfloat16)
    for wanted in (lm_head, nn.Sequential(lm_head)):
        found = lm_head_logits(wanted, x, precision=precision).logits
        assert torch.equal(found, lm_head_logits(plain, x, precision=precision).logits)
    found.sum().backward()
    assert lm_head.weight.grad.dtype == stored


@pytest.mark.parametrize(
    "policy",
    [
        {"param_dtype": torch.float32},
        {"param_dtype": torch.bfloat16},
        {"output_dtype": torch.bfloat16},
    ],
)
def test_parts_of_a_head_that_fsdp2_casts_for_are_an_error(gloo, policy):
    lm_head, _ = head(**policy)
    with pytest.raises(ConfigError, match=r"precision='bf16x3' needs .* fully_shard\(lm_head, mp"):
        lm_head_logits(lm_head, hidden(torch.bfloat16), precision="bf16x3")


def test_parts_of_a_bf16_weight_that_fsdp2_leaves_as_it_is_are_made(gloo):
    lm_head, weight = head(torch.bfloat16, param_dtype=torch.bfloat16)
    x = hidden(torch.bfloat16)
    found = lm_head_logits(lm_head, x, precision="bf16x3").logits
    assert torch.equal(found, nn.functional.linear(x.float(), weight.float()))


def test_bf16_runs_on_a_head_that_fsdp2_rounds(gloo):
    lm_head, weight = head(param_dtype=torch.bfloat16)
    x = hidden(torch.bfloat16)
    found = lm_head_logits(lm_head, x, precision="bf16").logits
    assert torch.equal(found, nn.functional.linear(x.float(), weight.bfloat16().float()))


SOURCE = """
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from automodel_fn import lm_head_logits

for stored in (torch.float32, torch.bfloat16):
    for precision in (None, "fp32"):
        lm_head = nn.Linear(16, 12, bias=False, dtype=stored)
        dist.broadcast(lm_head.weight.data, 0)
        x = torch.randn(2, 6, 16)
        dist.broadcast(x, 0)
        plan = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
        sharded = nn.Linear(16, 12, bias=False, dtype=stored)
        sharded.weight = nn.Parameter(lm_head.weight.detach().clone())
        sharded = parallelize_module(sharded, mesh, plan)
        spread = distribute_tensor(x, mesh, [Shard(1)])
        for keep in (0, 3, 6):
            expected = lm_head_logits(lm_head, x, logits_to_keep=keep, precision=precision).logits
            output = lm_head_logits(
                sharded, spread, logits_to_keep=keep, precision=precision, output_hidden_states=True
            )
            assert output.hidden_states is spread
            found = output.logits
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected)
        found.sum().backward()
        assert sharded.weight.grad.dtype == stored
"""
IN_PARTS = """
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from automodel_fn import ConfigError, LMHead, lm_head_logits, weight_parts

def whole(shape, dtype=torch.float32):
    made = torch.randn(shape).to(dtype)
    dist.broadcast(made, 0)
    return made

weight, bias, x = whole((13, 16)), whole(13), whole((2, 6, 16), torch.bfloat16)
grad = whole((2, 6, 13))
for precision in ("bf16x3", "bf16"):
    plain = nn.Linear(16, 13)
    plain.weight, plain.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    leaf = x.clone().requires_grad_()
    expected = lm_head_logits(plain, leaf, precision=precision).logits
    expected.backward(grad)
    for of_weight in (Shard(0), Replicate()):
        for of_hidden in (Replicate(), Shard(0), Shard(1), Shard(2)):
            for kind in ("plain", "called", "LMHead"):
                sharded = nn.Linear(16, 13)
                sharded.weight = nn.Parameter(distribute_tensor(weight, mesh, [of_weight]))
                sharded.bias = nn.Parameter(distribute_tensor(bias, mesh, [of_weight]))
                if kind == "LMHead":
                    sharded = LMHead.from_linear(sharded, precision=precision)
                called = nn.Sequential(sharded) if kind == "called" else sharded
                spread = distribute_tensor(x, mesh, [of_hidden]).requires_grad_()
                options = {} if kind == "LMHead" else {"precision": precision}
                if kind == "plain":
                    options["weight_parts"] = weight_parts(sharded.weight)
                found = lm_head_logits(called, spread, **options).logits
                assert found.shape == expected.shape and found.dtype == torch.float32
                found.backward(distribute_tensor(grad, mesh, found.placements))
                for left, right, tolerance in (
                    (found, expected.detach(), 1e-5),
                    (sharded.weight.grad, plain.weight.grad, 1e-5),
                    (sharded.bias.grad, plain.bias.grad, 1e-5),
                    (spread.grad, leaf.grad, 2**-6),
                ):
                    left = left.full_tensor()
                    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    parallel = LMHead(16, 13, precision=precision)
    parallel.weight = nn.Parameter(weight.clone())
    plan = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    parallel = parallelize_module(parallel, mesh, plan)
    leaf = distribute_tensor(x, mesh, [Shard(1)]).to_local()
    found = lm_head_logits(parallel, leaf).logits
    torch.testing.assert_close(found, expected.detach() - bias, rtol=1e-5, atol=1e-5)

sharded = nn.Linear(16, 13, bias=False)
sharded.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(1)]))
spread = distribute_tensor(x, mesh, [Shard(1)])
for given, message in ((x, "both be DTensors"), (spread, "Shard(0)")):
    try:
        lm_head_logits(sharded, given, precision="bf16x3")
    except ConfigError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
"""


@pytest.mark.slow
def test_a_head_under_tensor_and_sequence_parallel_gives_what_one_rank_gives(on_two_ranks):
    on_two_ranks(SOURCE)


@pytest.mark.slow
def test_parts_of_a_sharded_head_give_what_one_rank_gives(on_two_ranks):
    on_two_ranks(IN_PARTS)
