from hypothesis import example, given

from automodel_fn import Availability, BackendConfig
from automodel_fn.backend import Device, Package
from automodel_fn.testing import availabilities, backend_configs, check_resolve

CPU = Availability(python="3.12.0", torch="2.13.0")
HOPPER = Availability(
    python="3.12.0",
    torch="2.13.0",
    cuda="13.0",
    devices=(Device("H100", capability=(9, 0), memory_bytes=80 << 30),),
    packages=(
        Package("transformer-engine", version="2.20.2"),
        Package("deep_ep", version="1.2.1"),
    ),
    world_size=8,
)


@example(BackendConfig(), CPU)
@example(BackendConfig(), HOPPER)
# FP8 that has nothing but the experts to act on.
@example(BackendConfig(te_fp8="current", linear="torch"), HOPPER)
@example(BackendConfig(te_fp8="current", compile_attn=True), HOPPER)
@example(BackendConfig(experts="te", te_fp8="mxfp8"), HOPPER)
@example(BackendConfig(experts="torch"), HOPPER)
@given(backend_configs(), availabilities())
def test_what_is_resolved_can_run_and_is_explained(config, availability):
    check_resolve(config, availability)
