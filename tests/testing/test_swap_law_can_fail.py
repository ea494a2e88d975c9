import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from automodel_fn import BackendConfig, BackendUnavailableError, backend_plan
from automodel_fn.convert import _changes
from automodel_fn.testing import check_swaps

TORCH, FP32 = BackendConfig(rms_norm="torch"), BackendConfig(rms_norm="torch_fp32")


@pytest.fixture
def model():
    return nn.Sequential(LlamaRMSNorm(4), LlamaRMSNorm(4))


@pytest.mark.parametrize("moves", [[], [None], [FP32], [FP32, None, FP32], [TORCH, FP32, TORCH]])
def test_it_holds(model, moves):
    check_swaps(model, moves)


def test_a_backend_that_no_module_fits_is_no_move():
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=32,
        )
    ).double()
    move = BackendConfig(lm_head_precision="fp32")
    with pytest.raises(BackendUnavailableError):
        backend_plan(model, move)

    check_swaps(model, [FP32, move, None])


def _replacing(monkeypatch, change):
    own = _changes.ClassChange.exchange

    def exchange(self):
        own(self)
        change(self.module)

    monkeypatch.setattr(_changes.ClassChange, "exchange", exchange)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda module: setattr(module, "left", 1), "not where it began"),
        (lambda module: setattr(module, "variance_epsilon", 1.0), "not where it began"),
        (lambda module: setattr(module, "weight", nn.Parameter(module.weight)), "parameters"),
        (lambda module: module.register_parameter("more", nn.Parameter(module.weight)), "keys"),
        (lambda module: setattr(module, "_forward_hooks", {}), "not where it began"),
        (lambda module: setattr(module, "__class__", LlamaRMSNorm), "not as planned"),
    ],
)
def test_a_swap_that_leaves_or_changes_something_is_told(model, monkeypatch, change, message):
    _replacing(monkeypatch, change)
    with pytest.raises(AssertionError, match=message):
        check_swaps(model, [FP32])
