"""Which RMSNorms of transformers are known, and which are not: all that its code defines."""

import importlib
import inspect
from pathlib import Path

import pytest
import transformers.models
from torch import nn

from automodel_fn.convert._gated_norms import gated_convention
from automodel_fn.convert._norm_conventions import norm_convention

# None of these is an RMSNorm whose sums and products are those of `rms_norm_fp32`.
OTHERS = {
    "AXK2GatedRMSNorm": "a norm and an MLP; the norm in it is known",
    "DeepseekV4UnweightedRMSNorm": "rounds the factor before it multiplies",
    "Glm5NextTextUnweightedRMSNorm": "rounds the factor before it multiplies",
    "HYV4UnweightedRMSNorm": "gives the factor alone",
    "HYV4VLUnweightedRMSNorm": "gives the factor alone",
    "MuseSparkTextCenteredRMSNorm": "adds 1 to the weight in its own dtype",
    "MuseSparkTextInputScaledRMSNorm": "multiplies with the weight before it norms",
    "VoxtralRealtimeTextAdaRmsNorm": "an MLP",
    "xLSTMRMSNorm": "may have a bias, and may compute in the dtype of the input",
}


def norms():
    """Each class that is named as an RMSNorm, where it is defined."""
    for file in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        name = f"transformers.models.{file.parent.name}.{file.stem}"
        try:
            found = importlib.import_module(name)
        except ImportError:
            continue  # it needs a package that is not installed
        for each in vars(found).values():
            is_own = inspect.isclass(each) and each.__module__ == name
            if is_own and issubclass(each, nn.Module) and "rmsnorm" in each.__name__.lower():
                yield each


def is_known(norm):
    plain = any(norm_convention(norm, is_weighted) for is_weighted in (True, False))
    return plain or any(gated_convention(norm, first) for first in (True, False))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_rms_norm_of_transformers_is_known_or_named_here():
    found = {norm.__name__: is_known(norm) for norm in norms()}

    assert {name for name, known in found.items() if not known} <= set(OTHERS)
    assert sum(found.values()) > 180
