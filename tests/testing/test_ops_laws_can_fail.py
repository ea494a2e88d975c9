from types import MappingProxyType

import attrs
import pytest
import torch
from torch import nn

from automodel_fn import LMHeadOutput, RopeConfig, lm_head_logits, rms_norm_fp32, rope_config
from automodel_fn.testing import check_lm_head_logits, check_rms_norm, check_rope_config


@pytest.fixture
def x():
    return torch.tensor([[3.0, -4.0, 1.00390625], [1e-3, 2.0, 0.0]])


@pytest.fixture
def weight():
    return torch.tensor([1.0, 1.01171875, -2.0])


def rounds_the_input(x, weight, eps, **options):
    return rms_norm_fp32(x.bfloat16().float() if x.dtype == torch.float32 else x, weight, eps)


def computes_in_the_dtype_of_the_input(x, weight, eps, **options):
    scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return x * scale * weight.to(x.dtype)


def rounds_before_the_weight(x, weight, eps, *, weight_multiply):
    return rms_norm_fp32(x, weight, eps, weight_multiply="input")


def rounds_after_the_weight(x, weight, eps, *, weight_multiply):
    return rms_norm_fp32(x, weight, eps)


def forgets_eps(x, weight, eps, **options):
    return rms_norm_fp32(x, weight, 1e-30, **options)


def forgets_the_weight(x, weight, eps, **options):
    return rms_norm_fp32(x, None, eps, **options)


def gives_another_dtype(x, weight, eps, **options):
    return rms_norm_fp32(x, weight, eps, **options).double()


def drops_a_row(x, weight, eps, **options):
    return rms_norm_fp32(x, weight, eps, **options)[1:]


def differs_with_gradients(x, weight, eps, **options):
    found = rms_norm_fp32(x, weight, eps, **options)
    return torch.nextafter(found, found + 1) if x.requires_grad else found


def changes_its_input(x, weight, eps, **options):
    found = rms_norm_fp32(x, weight, eps, **options)
    if not x.requires_grad:
        x[0, 0] += 1
    return found


def loses_a_nan(x, weight, eps, **options):
    return rms_norm_fp32(x, weight, eps, **options).nan_to_num()


@pytest.mark.parametrize(
    "wrong",
    [
        rounds_the_input,
        forgets_eps,
        forgets_the_weight,
        gives_another_dtype,
        drops_a_row,
        differs_with_gradients,
        changes_its_input,
    ],
)
def test_a_norm_that_is_wrong_is_told(stand_in, x, weight, wrong):
    check_rms_norm(x, weight, 1e-3)
    stand_in("ops", "rms_norm_fp32", wrong)
    with pytest.raises(AssertionError, match="rms_norm_fp32"):
        check_rms_norm(x, weight, 1e-3)


@pytest.mark.parametrize(
    ("weight_multiply", "wrong"),
    [
        ("fp32", computes_in_the_dtype_of_the_input),
        ("fp32", rounds_before_the_weight),
        ("input", rounds_after_the_weight),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_that_rounds_elsewhere_is_told(stand_in, dtype, weight_multiply, wrong):
    x, weight = torch.randn(64, 64).to(dtype), torch.randn(64)
    check_rms_norm(x, weight, 1e-5, weight_multiply=weight_multiply)
    stand_in("ops", "rms_norm_fp32", wrong)
    with pytest.raises(AssertionError, match="allowed is"):
        check_rms_norm(x, weight, 1e-5, weight_multiply=weight_multiply)


def test_a_norm_that_loses_a_nan_is_told(stand_in, weight):
    x = torch.tensor([[float("nan"), 1.0, 1.0]])
    check_rms_norm(x, weight, 1e-5)
    stand_in("ops", "rms_norm_fp32", loses_a_nan)
    with pytest.raises(AssertionError, match=r"is 0\.0"):
        check_rms_norm(x, weight, 1e-5)


def changing(**changes):
    def project(lm_head, hidden_states, **options):
        output = lm_head_logits(lm_head, hidden_states, **{**options, **changes})
        return LMHeadOutput(output.logits, hidden_states)

    return project


def with_logits(change):
    def project(lm_head, hidden_states, **options):
        output = lm_head_logits(lm_head, hidden_states, **options)
        return LMHeadOutput(change(output.logits), output.hidden_states)

    return project


def slices_the_hidden_states(lm_head, hidden_states, **options):
    output = lm_head_logits(lm_head, hidden_states, **options)
    return LMHeadOutput(output.logits, hidden_states[:, -1:])


def casts_the_head(lm_head, hidden_states, **options):
    output = lm_head_logits(lm_head, hidden_states, **options)
    lm_head.float()
    return output


def leaves_a_gradient(lm_head, hidden_states, **options):
    lm_head_logits(lm_head, hidden_states, **options).logits.sum().backward()
    return lm_head_logits(lm_head, hidden_states, **options)


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@pytest.mark.parametrize(
    "wrong",
    [
        changing(precision=None),
        changing(logits_dtype="bf16"),
        changing(logits_to_keep=3),
        with_logits(lambda logits: logits[:, :-1]),
        with_logits(lambda logits: logits.flip(-2)),
        with_logits(lambda logits: logits.flip(0)),
        with_logits(lambda logits: logits.bfloat16().float()),
        with_logits(Doubling.apply),
        with_logits(torch.Tensor.detach),
        slices_the_hidden_states,
        casts_the_head,
        leaves_a_gradient,
    ],
)
def test_logits_that_are_wrong_are_told(stand_in, wrong):
    torch.manual_seed(0)
    lm_head, hidden = nn.Linear(16, 5, dtype=torch.bfloat16), torch.randn(2, 4, 16)
    check_lm_head_logits(lm_head, hidden, 2, precision="fp32")
    stand_in("ops", "lm_head_logits", wrong)
    with pytest.raises(AssertionError, match=r"logit|head|hidden|gradient"):
        check_lm_head_logits(lm_head, hidden, 2, precision="fp32")


@pytest.mark.parametrize(("precision", "other"), [("bf16x3", "bf16"), ("bf16", "bf16x3")])
def test_logits_of_another_precision_are_told(stand_in, precision, other):
    torch.manual_seed(0)
    lm_head, hidden = nn.Linear(16, 5), torch.randn(2, 4, 16).bfloat16()
    check_lm_head_logits(lm_head, hidden, precision=precision)
    stand_in("ops", "lm_head_logits", changing(precision=other))
    with pytest.raises(AssertionError, match="a logit is"):
        check_lm_head_logits(lm_head, hidden, precision=precision)


@pytest.mark.parametrize("keep", [2, torch.tensor([3, 0])])
def test_other_positions_than_the_kept_ones_are_told(stand_in, keep):
    lm_head, hidden = nn.Linear(16, 5), torch.randn(2, 4, 16)
    check_lm_head_logits(lm_head, hidden, keep)
    stand_in("ops", "lm_head_logits", changing(logits_to_keep=torch.tensor([0, 1])))
    with pytest.raises(AssertionError, match="a logit is"):
        check_lm_head_logits(lm_head, hidden, keep)


def reading(change):
    return lambda config: change(rope_config(config), config)


def forgets_the_older_spelling(found, config):
    get = config.get if isinstance(config, dict) else vars(config).get
    return found if get("rope_parameters") else RopeConfig(1.0)


def only_reads_objects(found, config):
    return RopeConfig(1.0) if isinstance(config, dict) else found


def changes_the_config(found, config):
    if isinstance(config, dict):
        config["rope_theta"] = 1.0
    return found


def forgets_parameters(found, config):
    if not isinstance(found, RopeConfig):
        return found
    return attrs.evolve(found, parameters={"rope_theta": 1.0, "rope_type": "yarn"})


def is_always_nested(found, config):
    return MappingProxyType({"a": found})


def scales_theta(found, config):
    return attrs.evolve(found, theta=found.theta * 2) if isinstance(found, RopeConfig) else found


@pytest.mark.parametrize(
    "wrong",
    [
        forgets_the_older_spelling,
        only_reads_objects,
        changes_the_config,
        forgets_parameters,
        is_always_nested,
        scales_theta,
    ],
)
def test_a_reading_that_depends_on_the_spelling_is_told(stand_in, wrong):
    parameters = {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0}
    check_rope_config(parameters)
    stand_in("ops", "rope_config", reading(wrong))
    with pytest.raises(AssertionError, match=r"read|changed"):
        check_rope_config(parameters)


@attrs.frozen
class HashedByParameters(RopeConfig):
    def __hash__(self):
        return hash((self.theta, len(self.parameters)))


def hashes_its_parameters(found, config):
    if not isinstance(found, RopeConfig):
        return found
    return HashedByParameters(found.theta, rope_type=found.rope_type, parameters=found.parameters)


def test_a_hash_that_depends_on_the_parameters_is_told(stand_in):
    parameters = {"rope_theta": 5e5, "rope_type": "default"}

    def nested_too(config):
        found = rope_config(config)
        if isinstance(found, RopeConfig):
            return hashes_its_parameters(found, config)
        return {kind: hashes_its_parameters(one, config) for kind, one in found.items()}

    stand_in("ops", "rope_config", nested_too)
    with pytest.raises(AssertionError, match="hash"):
        check_rope_config(parameters)
