from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# Run by torchrun, on several ranks.
collect_ignore = ["ranks"]

_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPECIAL_BITS = (
    -0x80000000,  # -0.0
    0x00000001,  # the smallest subnormal
    0x7F800000,  # inf
    0x7F800123,  # a signalling NaN with a payload
    -0x003FFEDD,  # a negative quiet NaN with a payload
    0x3F808000,  # halfway between two bf16, to even is down
    0x3F818000,  # halfway between two bf16, to even is up
    0x3F802FFF,  # 1.001..., which bf16 cannot hold
    0x7F7FFFFF,  # the largest float32, which rounds to inf
    0x38801000,  # halfway between two fp16
)


def _special(*shape):
    numel = torch.Size(shape).numel()
    repeated = (_SPECIAL_BITS * (numel // len(_SPECIAL_BITS) + 1))[:numel]
    return torch.tensor(repeated, dtype=torch.int32).view(torch.float32).reshape(shape).clone()


def _int_view(tensor):
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_VIEWS[tensor.dtype.itemsize])


def _same_bits(left, right):
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(_int_view(left), _int_view(right))
    )


def _tensors_of(model):
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


# Everything that a cast could damage: objects, dtypes, bits, gradients.
class _State:
    def __init__(self, model):
        self.objects, self.values = {}, {}
        for name, tensor in _tensors_of(model):
            self.objects[name] = id(tensor)
            self.values[name] = (tensor.dtype, _int_view(tensor).clone())
            if tensor.grad is not None:
                self.values[f"{name}.grad"] = (tensor.grad.dtype, _int_view(tensor.grad).clone())

    def differences(self, other):
        names = dict.fromkeys([*self.objects, *other.objects])
        replaced = [name for name in names if self.objects.get(name) != other.objects.get(name)]
        return [*replaced, *self.differing_values(other)]

    def differing_values(self, other):
        return [
            name
            for name in dict.fromkeys([*self.values, *other.values])
            if not _same_value(self.values.get(name), other.values.get(name))
        ]


def _same_value(left, right):
    return left and right and left[0] == right[0] and torch.equal(left[1], right[1])


# Calls `act` at the n-th operator, and at the next ones too if `times` says so.
class _AtOperator(TorchDispatchMode):
    def __init__(self, n, act, *, names=None, times=1):
        super().__init__()
        self.places, self.act, self.names, self.seen = range(n, n + times), act, names, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.names is None or func._schema.name in self.names:
            self.seen += 1
            if self.seen in self.places:
                self.act()
        return func(*args, **(kwargs or {}))


class _Block(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.register_buffer("table", table)
        self.register_buffer("inv_freq", _special(3), persistent=False)

    def forward(self, x):
        return self.norm(self.linear(x).float()).to(x.dtype)


class _Zoo(nn.Module):
    _keep_in_fp32_modules_strict = ("norm",)

    def __init__(self):
        super().__init__()
        table = _special(5)
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([_Block(table), _Block(table)])
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.special = nn.Parameter(_special(3, 5))
        self.transposed = nn.Parameter(_special(2, 6).t())
        flat = _special(20)
        self.left, self.right = nn.Parameter(flat[:12]), nn.Parameter(flat[8:])
        self.fp16 = nn.Parameter(torch.tensor([1.5, -0.0], dtype=torch.float16))
        self.bf16 = nn.Parameter(torch.tensor([1.5, -0.0], dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(1.001))
        self.empty = nn.Parameter(torch.empty(0, 3))
        for name, tensor in _left_alone().items():
            self.register_buffer(name, tensor)
        four_bits = torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        self.four_bits = nn.Parameter(four_bits, requires_grad=False)


def _left_alone():
    return {
        "count": torch.tensor([3, -1]),
        "mask": torch.tensor([True, False]),
        "turn": torch.tensor([1 + 2j, -0.0j], dtype=torch.complex64),
        "wide": torch.tensor([1.0000000000001], dtype=torch.float64),
        "eight_bits": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
    }


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _dynamo():
    with warnings.catch_warnings():
        # The first torch.compile imports parts of torch that use deprecated parts of torch.
        warnings.simplefilter("ignore")
        torch.compile(nn.Identity())


@pytest.fixture
def special():
    return _special


@pytest.fixture
def same_bits():
    return _same_bits


@pytest.fixture
def scramble():
    def change(model):
        for tensor in dict.fromkeys(tensor for _, tensor in _tensors_of(model)):
            _int_view(tensor).bitwise_not_()

    return change


@pytest.fixture
def state_of():
    return _State


@pytest.fixture
def tensors_of():
    return lambda model: dict(_tensors_of(model))


@pytest.fixture
def at_operator():
    return _AtOperator


@pytest.fixture
def make_zoo():
    return _Zoo


@pytest.fixture
def zoo():
    return _Zoo()


@pytest.fixture
def left_alone():
    return tuple(_left_alone())


@pytest.fixture
def entry_of():
    def find(plan, name):
        (found,) = [entry for entry in plan.entries if name in entry.names]
        return found

    return find


@pytest.fixture
def actions_of():
    return lambda plan: {name: entry.action for entry in plan.entries for name in entry.names}


@pytest.fixture
def make_holder():
    def make(cls=nn.Module, **tensors):
        module = cls()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter | nn.Module):
                setattr(module, name, tensor)
            else:
                module.register_buffer(name, tensor)
        return module

    return make
