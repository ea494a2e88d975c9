import pytest

SOURCE = """
from torch import nn
from torch.distributed.fsdp import fully_shard
from automodel_fn.compat import nemo

# The original warns of much when it is imported, and FSDP2 when it is used.
warnings.simplefilter("ignore")

if {is_original}:
    import nemo_automodel.components.models.common.utils as nemo


class Decay(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1.0, 2.0, 8))
        self.register_buffer("scale", torch.full((8,), 1.001))

    def forward(self, x):
        return (x.float() * self.weight * self.scale).to(x.dtype)


class Model(nn.Module):
    _keep_in_fp32_modules_strict = ["decay"]

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.decay, self.norm = Decay(), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.norm(self.decay(self.first(x))))


model = Model()
whole = model.decay.weight.detach().clone()
# The pin is a unit of its own, so that each unit has one dtype.
for unit in (model.decay, model):
    fully_shard(unit, mesh=mesh)
model._keep_in_fp32_modules = ["norm"]
parameters = dict(model.named_parameters())
before = {{name: p.to_local().clone() for name, p in parameters.items()}}
{then}
"""

CAST = """
nemo.cast_model_to_dtype(model)
pin = model.decay.weight
assert nemo._has_dtensor_params(model)
assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
"""

OURS = """
for name, p in model.named_parameters():
    wanted = torch.float32 if name == "decay.weight" else torch.bfloat16
    assert p.dtype == p.to_local().dtype == wanted, name
    assert torch.equal(p.to_local(), before[name].to(wanted)), name
assert torch.equal(pin.to_local(), before["decay.weight"])
assert model.decay.scale.dtype == torch.float32
x = torch.ones(2, 8, dtype=torch.bfloat16)
for _ in range(2):
    model(x).float().sum().backward()
for name, p in model.named_parameters():
    assert p.grad.dtype == p.grad.to_local().dtype == p.dtype, name
assert torch.equal(pin.full_tensor(), whole)
torch.optim.AdamW(model.parameters()).step()
"""

THEIRS = """
assert pin.dtype == torch.float32 and pin.to_local().dtype == torch.bfloat16
assert torch.equal(pin.to_local(), before["decay.weight"].bfloat16())
assert not torch.equal(pin.to_local(), before["decay.weight"])
"""


@pytest.mark.slow
def test_a_strict_pin_of_a_sharded_model_keeps_every_bit_and_the_model_runs(on_two_ranks):
    on_two_ranks(SOURCE.format(is_original=False, then=CAST + OURS))


@pytest.mark.slow
def test_the_original_leaves_the_shards_of_a_strict_pin_in_bf16(on_two_ranks, original):
    on_two_ranks(SOURCE.format(is_original=True, then=CAST + THEIRS))


@pytest.mark.slow
def test_a_sharded_model_is_fp32_within_and_the_pin_has_its_bits_after(on_two_ranks):
    on_two_ranks(
        SOURCE.format(
            is_original=False,
            then="""
nemo.cast_model_to_dtype(model)
with nemo.yield_fp32_model(model, torch.bfloat16):
    assert {p.to_local().dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        model.decay.weight.mul_(1.001)
assert model.first.weight.to_local().dtype == torch.bfloat16
assert torch.equal(model.decay.weight.to_local(), before["decay.weight"] * 1.001)
model(torch.ones(2, 8, dtype=torch.bfloat16)).float().sum().backward()
""",
        )
    )


@pytest.mark.slow
def test_snapshots_of_sharded_tensors_are_brought_back_with_their_shards(on_two_ranks):
    on_two_ranks(
        SOURCE.format(
            is_original=False,
            then="""
held = nemo._snapshot_fp32_tensors(
    model, parameter_keywords=["decay"], buffer_keywords=["decay"]
)
del Model._keep_in_fp32_modules_strict
model.to(torch.bfloat16)
nemo._restore_fp32_tensor_snapshots(
    model, parameter_snapshots=held[0], buffer_snapshots=held[1]
)
pin = model.decay.weight
assert pin is parameters["decay.weight"]
assert pin.dtype == pin.to_local().dtype == torch.float32
assert torch.equal(pin.to_local(), before["decay.weight"])
assert model.decay.scale.dtype == torch.float32
model(torch.ones(2, 8, dtype=torch.bfloat16)).float().sum().backward()
""",
        )
    )


@pytest.mark.slow
def test_frozen_sharded_parameters_are_left_to_fsdp2_and_their_buffers_are_cast(on_two_ranks):
    on_two_ranks(
        SOURCE.format(
            is_original=False,
            then="""
del Model._keep_in_fp32_modules_strict
nemo.cast_frozen_modules_to_compute_dtype(model.requires_grad_(False), torch.bfloat16)
assert {p.to_local().dtype for p in model.parameters()} == {torch.float32}
assert model.decay.scale.dtype == torch.bfloat16
""",
        )
    )


@pytest.mark.slow
def test_a_cast_of_shards_that_fails_leaves_the_model_as_it_was(on_two_ranks):
    on_two_ranks(
        SOURCE.format(
            is_original=False,
            then="""
import weakref
from automodel_fn import ConfigError

# torch cannot give a sharded parameter other data while a weak reference to it is held.
held = weakref.ref(model.norm.weight)
try:
    nemo.cast_model_to_dtype(model)
except ConfigError as error:
    assert "norm.weight" in str(error), error
else:
    raise AssertionError("the cast did not fail")
for name, p in model.named_parameters():
    assert p.dtype == p.to_local().dtype == torch.float32, name
    assert torch.equal(p.to_local(), before[name]), name
assert model.decay.scale.dtype == torch.float32
del held
nemo.cast_model_to_dtype(model)
assert model.norm.weight.to_local().dtype == torch.bfloat16
model(torch.ones(2, 8, dtype=torch.bfloat16)).float().sum().backward()
""",
        )
    )


@pytest.mark.slow
def test_a_model_is_cast_after_a_forward_and_runs(on_two_ranks):
    on_two_ranks(
        SOURCE.format(
            is_original=False,
            then="""
with torch.no_grad():
    model(torch.ones(2, 8))
assert not hasattr(model.first.weight, "to_local")
nemo.cast_model_to_dtype(model)
assert hasattr(model.first.weight, "to_local")
assert dict(model.named_parameters())["first.weight"] is parameters["first.weight"]
for name, p in model.named_parameters():
    wanted = torch.float32 if name == "decay.weight" else torch.bfloat16
    assert p.dtype == p.to_local().dtype == wanted, name
    assert torch.equal(p.to_local(), before[name].to(wanted)), name
model(torch.ones(2, 8, dtype=torch.bfloat16)).float().sum().backward()
assert {p.grad.to_local().dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
""",
        )
    )
