import pytest

from automodel_fn import Availability
from automodel_fn.backend import Device, Package


@pytest.fixture(scope="session")
def machine():
    def make(capability=None, *, cuda="13.0", world_size=1, **packages):
        devices = () if capability is None else (_device(capability),)
        return Availability(
            python="3.12.0",
            torch="2.13.0",
            cuda=cuda,
            devices=devices,
            packages=tuple(
                Package("transformer-engine" if name == "te" else name, version=version)
                for name, version in packages.items()
            ),
            world_size=world_size,
        )

    return make


def _device(capability):
    return Device("GPU", capability=capability, memory_bytes=80 << 30)
