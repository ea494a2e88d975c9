import attrs
import pytest

from automodel_fn import Availability, ConfigError
from automodel_fn.backend import Device, Package, Verdict

NAMES = ("transformer-engine", "tilelang", "grouped_gemm", "torchao", "deep_ep", "uccl")
EVERYTHING = tuple(Package(name, version="99.0") for name in NAMES)
ALWAYS = {
    "attn=eager",
    "attn=sdpa",
    "attn=flex",
    "linear=torch",
    "rms_norm=torch",
    "rms_norm=torch_fp32",
    "rope_fusion=False",
    "rope_fusion=True",
    "async_masks=False",
    "async_masks=True",
    "swiglu=recomputed",
    "swiglu=torch",
    "swiglu=fused",
    "loss=torch",
    "loss=fused",
    "experts=torch",
    "dispatcher=torch",
}


def machine(*capabilities, packages=(), cuda="13.0", world_size=8):
    devices = tuple(
        Device(f"GPU {index}", capability=capability, memory_bytes=1 << 30)
        for index, capability in enumerate(capabilities)
    )
    return Availability(
        python="3.11.7",
        torch="2.13.0",
        cuda=cuda,
        devices=devices,
        packages=packages,
        world_size=world_size,
    )


def verdict(found, backend):
    listed = next(v for v in found.verdicts() if v.backend == backend)
    assert found.verdict(backend) == listed
    return listed


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
    assert found.package("torchao") == Package("torchao", version="99.0")
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
    refused = verdict(machine(below, packages=EVERYTHING), backend)
    assert not refused.can_run
    assert f"capability {below[0]}.{below[1]}, at least {major}.{minor} is needed" in refused.reason


def test_the_best_of_several_gpus_counts():
    found = machine((7, 5), (9, 0), (8, 0), packages=EVERYTHING)
    assert verdict(found, "te_fp8=block").can_run
    assert not verdict(found, "te_fp8=mxfp8").can_run


def test_an_unknown_backend_has_no_verdict():
    with pytest.raises(ConfigError, match="backend='attn=sdp' is none that is known"):
        machine().verdict("attn=sdp")


@pytest.mark.parametrize("backend", ["te_fp8=mxfp8", "experts=torch_mm_mxfp8"])
@pytest.mark.parametrize("capability", [(12, 0), (12, 1)])
def test_a_gpu_can_also_be_too_new(backend, capability):
    major, minor = capability
    refused = verdict(machine(capability, packages=EVERYTHING), backend)
    assert not refused.can_run
    assert refused.reason == (
        f"the GPU has compute capability {major}.{minor}, less than 12.0 is needed"
    )
    assert verdict(machine((8, 0), capability, (10, 3), packages=EVERYTHING), backend).can_run


@pytest.mark.parametrize(
    ("backend", "package", "least", "below"),
    [
        ("attn=te", "transformer-engine", "2.0", "1.13.0"),
        ("te_fp8=current", "transformer-engine", "2.2", "2.1.0"),
        ("te_fp8=mxfp8", "transformer-engine", "2.3", "2.2.1"),
        ("te_fp8=block", "transformer-engine", "2.9", "2.8.9"),
        ("te_fp8=nvfp4", "transformer-engine", "2.8", "2.7"),
        ("experts=torch_mm_mxfp8", "torchao", "0.13", "0.12.0"),
    ],
)
def test_the_version_of_a_package_must_suffice(backend, package, least, below):
    def found(version):
        return verdict(machine((10, 0), packages=(Package(package, version=version),)), backend)

    assert found(least).can_run
    assert found(f"{least}.1+70f53666").can_run
    assert not found(below).can_run
    assert found(below).reason == f"{package} is {below}, at least {least} is needed"


def test_a_version_that_cannot_be_read_does_not_suffice():
    found = machine((9, 0), packages=(Package("transformer-engine", version="unknown"),))
    reason = "transformer-engine is unknown, at least 2.0 is needed"
    assert verdict(found, "attn=te").reason == reason


def test_versions_are_compared_as_numbers():
    found = machine((9, 0), packages=(Package("transformer-engine", version="2.20.2"),))
    assert verdict(found, "te_fp8=block").can_run


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize(
    ("cuda", "reason"),
    [
        ("12.8", "PyTorch was built for CUDA 12.8, at least CUDA 12.9 is needed"),
        (None, "PyTorch was built without CUDA, at least CUDA 12.9 is needed"),
        ("12.9", "can run"),
        ("13.0", "can run"),
    ],
)
def test_block_scaling_needs_a_recent_cuda(capability, cuda, reason):
    found = machine(capability, packages=EVERYTHING, cuda=cuda)
    assert verdict(found, "te_fp8=block").reason == reason


@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        ((9, 0), "2.3", "can run"),
        ((9, 0), "2.2", "transformer-engine is 2.2, at least 2.3 is needed"),
        ((10, 0), "2.3", "transformer-engine is 2.3, at least 2.9 is needed"),
        ((10, 0), "2.9", "can run"),
        ((8, 9), "2.9", "the GPU has compute capability 8.9, at least 9.0 is needed"),
    ],
)
def test_of_several_ways_the_one_for_this_gpu_is_spoken_of(capability, version, reason):
    found = machine(capability, packages=(Package("transformer-engine", version=version),))
    assert verdict(found, "te_fp8=block").reason == reason


@pytest.mark.parametrize("name", ["deepep", "hybridep", "uccl_ep"])
def test_a_dispatcher_needs_someone_to_dispatch_to(name):
    alone = verdict(machine((9, 0), packages=EVERYTHING, world_size=1), f"dispatcher={name}")
    assert alone.reason == "world_size=1, at least 2 ranks are needed"
    two = machine((9, 0), packages=EVERYTHING, world_size=2)
    assert verdict(two, f"dispatcher={name}").can_run
