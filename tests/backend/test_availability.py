import attrs
import pytest

from automodel_fn import Availability
from automodel_fn.backend import Device, Package, Verdict

EVERYTHING = tuple(
    Package(name, version="2.0")
    for name in (
        "transformer-engine",
        "tilelang",
        "grouped_gemm",
        "torchao",
        "deep_ep",
        "uccl",
    )
)
ALWAYS = {
    "attn=eager",
    "attn=sdpa",
    "attn=flex",
    "linear=torch",
    "rms_norm=torch",
    "rms_norm=torch_fp32",
    "experts=torch",
    "dispatcher=torch",
}


def machine(*capabilities, packages=()):
    devices = tuple(
        Device(f"GPU {index}", capability=capability, memory_bytes=1 << 30)
        for index, capability in enumerate(capabilities)
    )
    return Availability(python="3.11.7", torch="2.13.0", devices=devices, packages=packages)


def verdict(found, backend):
    return next(v for v in found.verdicts() if v.backend == backend)


def runnable(found):
    return {v.backend for v in found.verdicts() if v.can_run}


def test_an_availability_is_a_value():
    assert machine((9, 0)) == machine((9, 0))
    assert machine((9, 0)) != machine((8, 0))
    assert len({machine(), machine(), machine((8, 0))}) == 2
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        machine().torch = "3.0"


def test_its_fields_are_given_by_name():
    with pytest.raises(TypeError):
        Availability("3.11.7", "2.13.0")
    with pytest.raises(TypeError):
        Device("GPU", (9, 0), 1)
    with pytest.raises(TypeError):
        Verdict("attn=te", True, "can run")


@pytest.mark.parametrize(
    ("package", "is_usable"),
    [
        (Package("x"), False),
        (Package("x", version="1.0"), True),
        (Package("x", version="1.0", problem="broken"), False),
        (Package("x", problem="broken"), False),
    ],
)
def test_a_package_is_usable_if_installed_and_without_a_problem(package, is_usable):
    assert package.is_usable is is_usable


def test_an_unknown_package_is_not_installed():
    found = machine(packages=EVERYTHING)
    assert found.package("torchao") == Package("torchao", version="2.0")
    assert found.package("unheard-of") == Package("unheard-of")


def test_each_backend_has_one_verdict():
    backends = [v.backend for v in machine().verdicts()]
    assert len(backends) == len(set(backends))
    assert set(backends) >= ALWAYS | {"attn=te", "linear=te", "experts=gmm", "dispatcher=deepep"}


def test_a_bare_machine_runs_what_needs_nothing_and_no_more():
    assert runnable(machine()) == ALWAYS
    assert {verdict(machine(), backend).reason for backend in ALWAYS} == {"can run"}


def test_packages_without_a_gpu_run_nothing_more():
    found = machine(packages=EVERYTHING)
    assert runnable(found) == ALWAYS
    assert verdict(found, "attn=te").reason == "there is no CUDA GPU"


def test_a_gpu_without_packages_runs_torchs_own_only():
    found = machine((10, 0))
    assert runnable(found) == {*ALWAYS, "experts=torch_mm"}
    assert verdict(found, "linear=te").reason == "transformer-engine is not installed"


def test_with_everything_everything_runs():
    found = machine((10, 0), packages=EVERYTHING)
    assert all(v.can_run and v.reason == "can run" for v in found.verdicts())


def test_all_that_is_missing_is_said_at_once():
    reason = verdict(machine(), "dispatcher=deepep").reason
    assert reason == "deep_ep is not installed; there is no CUDA GPU"


def test_a_problem_of_a_package_is_the_reason():
    broken = Package("transformer-engine", version="2.0", problem="no extension")
    found = verdict(machine((9, 0), packages=(broken,)), "linear=te")
    assert not found.can_run
    assert found.reason == "transformer-engine 2.0: no extension"


@pytest.mark.parametrize(
    ("backend", "least"),
    [
        ("attn=te", (8, 0)),
        ("te_fp8=current", (8, 9)),
        ("te_fp8=block", (9, 0)),
        ("te_fp8=mxfp8", (10, 0)),
        ("experts=torch_mm", (8, 0)),
        ("experts=torch_mm_mxfp8", (10, 0)),
        ("dispatcher=hybridep", (9, 0)),
    ],
)
def test_the_compute_capability_must_suffice(backend, least):
    major, minor = least
    below = (major, minor - 1) if minor else (major - 1, 9)
    assert verdict(machine(least, packages=EVERYTHING), backend).can_run
    assert verdict(machine((12, 0), packages=EVERYTHING), backend).can_run
    refused = verdict(machine(below, packages=EVERYTHING), backend)
    assert not refused.can_run
    assert f"capability {below[0]}.{below[1]}, at least {major}.{minor} is needed" in refused.reason


def test_the_best_of_several_gpus_counts():
    found = machine((7, 5), (9, 0), (8, 0), packages=EVERYTHING)
    assert verdict(found, "te_fp8=block").can_run
    assert not verdict(found, "te_fp8=mxfp8").can_run
