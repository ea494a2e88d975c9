from hypothesis import HealthCheck, find, settings

from automodel_fn import cast_plan
from automodel_fn.testing import models

FEW = settings(max_examples=200, suppress_health_check=list(HealthCheck), deadline=None)


def test_the_models_have_ties_among_them():
    model = find(models(), has_tie, settings=FEW)

    assert has_tie(model)


def has_tie(model):
    return any(len(entry.names) > 1 for entry in cast_plan(model, "bf16").entries)
