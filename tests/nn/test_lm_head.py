import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrize

from automodel_fn import ConfigError, LMHead, bf16, invalidate, lm_head_logits, weight_parts
from automodel_fn.nn import _lm_head

H, V = 16, 11
precisions = pytest.mark.parametrize("precision", ["bf16x3", "bf16", "fp32"])
kept = pytest.mark.parametrize("precision", ["bf16x3", "bf16"])


def linear(dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    return nn.Linear(H, V, bias=bias, dtype=dtype)


def hidden(*shape):
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.fixture
def used_parts(monkeypatch):
    """The parts that forwards multiply, made as on CUDA."""
    used = []

    def product(*args, parts, **options):
        used.append(parts)
        return logits_product(*args, parts=parts, **options)

    logits_product = _lm_head.logits_product
    monkeypatch.setattr(_lm_head, "logits_product", product)
    monkeypatch.setattr(LMHead, "_has_use_for_parts", lambda *_: True)
    return used


@pytest.mark.parametrize("bias", [False, True])
@precisions
def test_its_logits_are_those_of_the_function(precision, bias):
    plain, x = linear(bias=bias), hidden(2, 5)
    expected = lm_head_logits(plain, x, precision=precision).logits
    found = LMHead.from_linear(plain, precision=precision)(x)

    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert found._base is None


@precisions
def test_the_function_leaves_the_precision_to_it(precision):
    head, x = LMHead.from_linear(linear(), precision=precision), hidden(2, 5)
    for asked in (None, precision):
        found = lm_head_logits(head, x, precision=asked, logits_to_keep=2, logits_dtype="bf16")
        assert torch.equal(found.logits, head(x[:, 3:]).bfloat16())


@precisions
def test_inside_of_another_module_it_keeps_to_its_precision(precision):
    head, x = LMHead.from_linear(linear(), precision=precision), hidden(2, 5)
    wrapped = nn.Sequential(nn.Identity(), head)
    for asked in (None, precision):
        assert torch.equal(lm_head_logits(wrapped, x, precision=asked).logits, head(x))
    other = "bf16" if precision == "bf16x3" else "bf16x3"
    with pytest.raises(ConfigError, match=f"precision of its own, '{precision}'"):
        lm_head_logits(wrapped, x, precision=other)


@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"precision": "bf16"}])
def test_another_precision_than_its_own_is_an_error(options):
    with pytest.raises(ConfigError, match="precision of its own, 'bf16x3'"):
        lm_head_logits(LMHead(H, V), hidden(2), **options)


def test_parts_of_another_are_an_error():
    head = LMHead(H, V)
    with pytest.raises(ConfigError, match="keeps its own parts"):
        lm_head_logits(head, hidden(2), precision="bf16x3", weight_parts=head.parts())


def test_it_is_a_linear_with_the_same_parameters_and_state():
    plain = linear(bias=True)
    head = LMHead.from_linear(plain.eval())

    assert isinstance(head, nn.Linear)
    assert head.weight is plain.weight
    assert head.bias is plain.bias
    assert not head.training
    assert list(head.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    head.parts()
    assert list(head.state_dict()) == ["weight", "bias"]
    assert not list(head.buffers())


def test_a_tied_weight_stays_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(V, H), "lm_head": linear()})
    model["lm_head"].weight = model["embed"].weight
    model["lm_head"] = LMHead.from_linear(model["lm_head"])
    model["lm_head"](model["embed"](torch.tensor([1])).bfloat16()).sum().backward()

    assert len(list(model.parameters())) == 1
    assert model["embed"].weight.grad is not None


def test_made_new_it_is_initialised_as_a_linear():
    torch.manual_seed(0)
    head = LMHead(H, V, dtype="bf16")

    assert torch.equal(head.weight, linear(torch.bfloat16).weight)
    assert head.bias is None
    assert "precision='bf16x3'" in repr(head)


@pytest.mark.parametrize(
    "options", [{"precision": "tf32"}, {"dtype": torch.float64}, {"dtype": "int8"}]
)
def test_other_options_are_errors(options):
    with pytest.raises(ConfigError, match="make no LMHead"):
        LMHead(H, V, **options)


class Doubled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


def hooked():
    plain = linear()
    plain.register_forward_hook(lambda *_: None)
    return plain


@pytest.mark.parametrize("wrong", [Doubled(H, V), nn.Sequential(linear()), hooked()])
def test_what_is_no_plain_linear_is_an_error(wrong):
    with pytest.raises(ConfigError, match=r"must be a plain nn\.Linear"):
        LMHead.from_linear(wrong)


def test_hidden_states_of_another_dtype_are_an_error():
    with pytest.raises(ConfigError, match="takes bf16"):
        LMHead(H, V)(hidden(2).float())
    assert LMHead(H, V, precision="fp32")(hidden(2).float()).dtype == torch.float32


@kept
def test_parts_are_kept_while_the_weight_stays_as_it_is(precision):
    head = LMHead.from_linear(linear(), precision=precision)
    first = head.parts()
    head(hidden(2)).sum().backward()

    assert head.parts() is first
    assert torch.equal(first.high, linear().weight.bfloat16())
    assert first.num_parts == {"bf16": 1, "bf16x3": 3}[precision]


def step(head):
    head(hidden(2)).sum().backward()
    torch.optim.SGD(head.parameters(), lr=1.0).step()


def in_place(head):
    with torch.no_grad():
        head.weight.mul_(2)


def data_and_invalidate(head):
    head.weight.data.mul_(2)
    invalidate(head)


def load(head):
    head.load_state_dict({"weight": torch.ones(V, H)})


def assign(head):
    head.load_state_dict({"weight": torch.ones(V, H)}, assign=True)


def replace(head):
    head.weight = nn.Parameter(torch.ones(V, H))


def cast(head):
    head.half()


@pytest.mark.parametrize(
    "change", [step, in_place, data_and_invalidate, load, assign, replace, cast]
)
@kept
def test_parts_are_made_anew_after_a_change(precision, change):
    head = LMHead.from_linear(linear(), precision=precision)
    first = head.parts()
    change(head)
    found = head.parts()

    assert found is not first
    expected = head.weight.bfloat16() if precision == "bf16" else weight_parts(head.weight).stacked
    assert torch.equal(found.stacked, expected)


def test_parts_of_one_optimizer_step_are_made_once(monkeypatch):
    made = []

    def counting(weight):
        made.append(weight)
        return weight_parts(weight)

    monkeypatch.setattr("automodel_fn.nn._lm_head.weight_parts", counting)
    head = LMHead.from_linear(linear())
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(3):
        for _ in range(4):
            head.parts()
            head(hidden(2)).sum().backward()
        optimizer.step()

    assert len(made) == 3


@kept
def test_old_parts_are_gone_before_new_ones_are_made(monkeypatch, precision):
    name = "rounded_weight" if precision == "bf16" else "weight_parts"
    make, old = getattr(_lm_head, name), []

    def making(weight):
        assert all(parts() is None for parts in old)
        made = make(weight)
        old.append(weakref.ref(made))
        return made

    monkeypatch.setattr(_lm_head, name, making)
    head = LMHead.from_linear(linear(), precision=precision)
    for _ in range(3):
        head.parts()
        in_place(head)

    assert len(old) == 3


@pytest.mark.parametrize(
    ("precision", "options", "is_used"),
    [
        ("bf16x3", {}, True),
        ("bf16", {}, True),
        ("fp32", {}, False),
        ("bf16x3", {"keep_parts": False}, False),
        ("bf16x3", {"on_cuda": False}, False),
        ("bf16x3", {"is_compiling": True}, False),
        ("bf16x3", {"is_fake": True}, False),
        ("bf16x3", {"is_capturing": True}, False),
        ("bf16x3", {"is_capturing": True, "is_frozen": True}, True),
    ],
)
def test_a_forward_uses_kept_parts_on_a_gpu_where_it_may(monkeypatch, precision, options, is_used):
    class OnCuda(nn.Parameter):
        is_cuda = options.get("on_cuda", True)
        requires_grad = not options.get("is_frozen", False)

    is_compiling, is_capturing = options.get("is_compiling"), options.get("is_capturing")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: bool(is_compiling))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(is_capturing))
    if options.get("is_fake"):
        monkeypatch.setattr(_lm_head, "FakeTensor", OnCuda)
    head = LMHead(H, V, precision=precision, keep_parts=options.get("keep_parts", True))

    assert head._has_use_for_parts(OnCuda(torch.ones(1))) is is_used


def test_nothing_is_kept_where_it_is_not_wanted_or_costs_nothing():
    assert LMHead.from_linear(linear(), keep_parts=False).parts() is not None
    for head in (LMHead(H, V, keep_parts=False), LMHead(H, V, dtype=torch.bfloat16)):
        head.parts()
        assert head._kept is None


class Noisy(nn.Module):
    """Another weight each time that it is looked up."""

    num_calls = 0

    def forward(self, weight):
        self.num_calls += 1
        return weight * self.num_calls


@kept
def test_parts_of_a_weight_that_is_computed_are_of_the_one_it_multiplies(used_parts, precision):
    head = LMHead.from_linear(linear(), precision=precision)
    noise = Noisy()
    parametrize.register_parametrization(head, "weight", noise, unsafe=True)
    for _ in range(2):
        noise.num_calls = 2
        head(hidden(2))
        assert noise.num_calls == 3

    assert used_parts[0] is not used_parts[1]
    for parts in used_parts:
        assert torch.equal(parts.high, (linear().weight * 3).bfloat16())
    assert head._kept is None


def test_on_the_cpu_a_forward_makes_no_parts():
    head = LMHead(H, V)
    head(hidden(2))

    assert head._kept is None


def test_parts_are_neither_copied_nor_pickled():
    head = LMHead.from_linear(linear())
    head.parts()
    stream = io.BytesIO()
    torch.save(head, stream)
    saved = torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), saved):
        assert other._kept is None
        assert torch.equal(other(hidden(2)), head(hidden(2)))
    assert head._kept is not None


def test_parts_made_in_inference_mode_serve_a_backward():
    head = LMHead.from_linear(linear())
    with torch.inference_mode():
        parts = head.parts()
    assert head.parts() is parts
    assert not parts.stacked.is_inference()


def test_a_cast_of_the_model_leaves_a_head_that_works():
    model = nn.Sequential(LMHead.from_linear(linear()))
    model[0].parts()
    model.to(bf16)

    expected = lm_head_logits(linear().to(bf16), hidden(2), precision="bf16x3").logits
    assert model[0].parts().num_parts == 1
    assert torch.equal(model(hidden(2)), expected)


@precisions
def test_it_compiles_in_one_graph_with_the_same_bits(precision):
    torch._dynamo.reset()
    head = LMHead.from_linear(linear(), precision=precision)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)

    assert torch.equal(compiled(hidden(2, 5)), head(hidden(2, 5)))


def test_fake_and_meta_tensors_give_shapes():
    head = LMHead(H, V, device="meta")
    x = torch.empty(2, 5, H, device="meta", dtype=torch.bfloat16)
    assert (head(x).shape, head(x).device.type) == ((2, 5, V), "meta")
    with FakeTensorMode():
        found = LMHead(H, V)(torch.empty(2, 5, H, dtype=torch.bfloat16))
    assert found.shape == (2, 5, V)


@kept
def test_fsdp2_shards_it_as_a_linear(gloo, precision):
    plain = linear()
    expected = lm_head_logits(plain, hidden(2, 5), precision=precision).logits
    mesh = init_device_mesh("cpu", (1,))
    head = fully_shard(LMHead.from_linear(plain, precision=precision), mesh=mesh)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    found = head(hidden(2, 5))
    assert torch.equal(found, expected)
    found.sum().backward()
    optimizer.step()
    changed = linear()
    changed.weight = nn.Parameter(head.weight.full_tensor().detach())
    again = lm_head_logits(changed, hidden(2, 5), precision=precision).logits
    assert torch.equal(head(hidden(2, 5)), again)


@kept
def test_parts_of_the_weight_that_fsdp2_gathers_are_kept_until_it_changes(
    gloo, used_parts, precision
):
    head = fully_shard(
        LMHead.from_linear(linear(), precision=precision), mesh=init_device_mesh("cpu", (1,))
    )
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)

    def double():
        head.weight.to_local().data.mul_(2)
        invalidate(head)

    for change in (optimizer.step, double):
        used_parts.clear()
        for _ in range(2):
            head(hidden(2, 5)).sum().backward()
        change()
        head(hidden(2, 5))

        assert used_parts[0] is used_parts[1]
        head.reshard()
        whole = head.weight.full_tensor().detach()
        expected = whole.bfloat16() if precision == "bf16" else weight_parts(whole).stacked
        assert torch.equal(used_parts[2].stacked, expected)


@kept
def test_in_the_group_of_its_model_it_multiplies_what_fsdp2_rounds(gloo, precision):
    model = nn.Sequential(nn.Linear(H, H, bias=False), LMHead.from_linear(linear()))
    body = model[0].weight.detach().clone()
    model[1].precision = precision
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    found = model(hidden(2, 5))
    inner = nn.functional.linear(hidden(2, 5), body.bfloat16())
    rounded = linear().to(torch.bfloat16)

    assert torch.equal(found, lm_head_logits(rounded, inner, precision="bf16x3").logits)
    found.sum().backward()
    assert model[1].weight.grad.dtype == torch.float32


def test_an_input_that_fsdp2_casts_is_an_error_that_says_so(gloo):
    policy = MixedPrecisionPolicy(param_dtype=torch.float32)
    head = fully_shard(LMHead(H, V), mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    with pytest.raises(ConfigError, match="unless cast_forward_inputs=False"):
        head(hidden(2))


def test_kept_parts_of_a_sharded_weight_are_those_of_its_shard_and_follow_it(gloo):
    mesh = init_device_mesh("cpu", (1,))
    head = LMHead(H, V)
    head.weight = nn.Parameter(distribute_tensor(linear().weight.detach(), mesh, [Shard(0)]))
    first = head.parts()
    assert torch.equal(first.stacked, weight_parts(linear().weight).stacked)
    assert head.parts() is first
    with torch.no_grad():
        head.weight.mul_(2)
    assert torch.equal(head.parts().stacked, weight_parts(linear().weight * 2).stacked)
