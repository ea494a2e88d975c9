import gc

import pytest
import torch

from automodel_fn.bench import _observe
from automodel_fn.bench._observe import observed


def has_peak():
    return observed(lambda: None, "cpu")[1].peak_mib is not None


def test_a_call_is_made_once_and_its_result_returned():
    calls = []
    result, seen = observed(lambda: calls.append(1) or "result", "cpu")

    assert result == "result"
    assert calls == [1]
    assert seen.ms >= 0


@pytest.mark.skipif(not has_peak(), reason="the platform does not tell the peak")
def test_a_peak_is_seen_although_it_is_over_when_the_call_ends():
    _, seen = observed(lambda: torch.ones(16 * 2**20).sum(), "cpu")

    assert seen.peak_mib == pytest.approx(64, abs=4)


@pytest.mark.skipif(not has_peak(), reason="the platform does not tell the peak")
def test_an_earlier_peak_does_not_count():
    torch.ones(32 * 2**20).sum()

    assert observed(lambda: None, "cpu")[1].peak_mib < 4


def test_where_the_platform_does_not_tell_the_peak_it_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(_observe, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")

    assert observed(lambda: None, "cpu")[1].peak_mib is None


def test_the_collector_is_left_on():
    assert observed(gc.isenabled, "cpu")[0]


def test_the_collector_can_be_paused_and_is_on_again_also_after_an_error():
    assert not observed(gc.isenabled, "cpu", pauses_gc=True)[0]
    assert gc.isenabled()

    with pytest.raises(ZeroDivisionError):
        observed(lambda: 1 / 0, "cpu", pauses_gc=True)
    assert gc.isenabled()
