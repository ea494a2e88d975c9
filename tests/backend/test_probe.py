import os
import platform
import subprocess
import sys

import pytest
import torch
import transformers

from automodel_fn import probe
from automodel_fn.backend import Availability, Package

OPTIONAL = ["transformer-engine", "tilelang", "grouped_gemm", "torchao", "deep_ep", "uccl"]
MODULES = ["transformers", "transformer_engine", "tilelang", "grouped_gemm", "torchao", "deep_ep"]


@pytest.fixture
def install(tmp_path, monkeypatch):
    def put(name, version, *modules):
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata)
        for module in modules:
            (tmp_path / f"{module}.py").write_text("raise AssertionError('imported')\n")

    monkeypatch.syspath_prepend(tmp_path)
    return put


def test_a_probe_says_what_runs_here():
    found = probe()
    assert isinstance(found, Availability)
    assert found.python == platform.python_version()
    assert found.torch == torch.__version__
    assert found.cuda == torch.version.cuda
    assert found.num_threads == torch.get_num_threads()
    assert found.package("transformers") == Package(
        "transformers", version=transformers.__version__
    )


def test_two_probes_are_equal_and_change_nothing():
    threads = torch.get_num_threads()
    assert probe() == probe()
    assert hash(probe()) == hash(probe())
    assert torch.get_num_threads() == threads


def test_the_number_of_threads_is_the_present_one():
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert probe().num_threads == threads + 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("announced", "expected"),
    [("8", 8), ("1", 1), ("", 1), ("0", 1), ("-2", 1), ("many", 1), (None, 1)],
)
def test_a_launcher_says_how_many_ranks_there_are(monkeypatch, announced, expected):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if announced is not None:
        monkeypatch.setenv("WORLD_SIZE", announced)
    assert probe().world_size == expected
    assert not torch.distributed.is_initialized()


def test_a_process_group_that_is_there_counts_and_not_what_was_announced(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "8")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert probe().world_size == 1
    finally:
        torch.distributed.destroy_process_group()


def test_there_is_a_device_for_each_gpu():
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = probe().devices
    assert len(devices) == count
    for index, device in enumerate(devices):
        assert device.name == torch.cuda.get_device_name(index)
        assert device.capability == torch.cuda.get_device_capability(index)
        assert device.memory_bytes > 1 << 30


def test_each_package_is_listed_once_also_where_it_is_missing():
    names = [package.name for package in probe().packages]
    assert sorted(names) == sorted(["transformers", "triton", *OPTIONAL])


@pytest.mark.parametrize("name", ["tilelang", "grouped_gemm", "torchao", "deep_ep", "uccl"])
def test_an_installed_package_is_found_and_not_imported(install, name):
    install(name, "1.2.3", name)
    assert probe().package(name) == Package(name, version="1.2.3")
    assert name not in sys.modules


@pytest.mark.parametrize("name", ["tilelang", "torchao"])
def test_a_package_whose_module_is_gone_is_not_usable(install, name):
    install(name, "1.2.3")
    found = probe().package(name)
    assert found.version == "1.2.3"
    assert found.problem == f"its module {name} is not importable"
    assert not found.is_usable


def test_transformer_engine_without_its_extension_is_not_usable(install):
    install("transformer-engine", "2.20.2", "transformer_engine")
    found = probe().package("transformer-engine")
    assert found.version == "2.20.2"
    assert "transformer-engine[pytorch]" in found.problem
    assert not found.is_usable


def test_transformer_engine_with_its_extension_is_usable(install):
    install("transformer-engine", "2.20.2", "transformer_engine", "transformer_engine_torch")
    assert probe().package("transformer-engine").is_usable


@pytest.mark.parametrize("folder", ["", "wheel_lib"])
def test_transformer_engine_is_usable_too_where_its_extension_lies_inside_it(
    install, tmp_path, folder
):
    install("transformer-engine", "2.20.2")
    package = tmp_path / "transformer_engine"
    (package / folder).mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    assert not probe().package("transformer-engine").is_usable
    (package / folder / "transformer_engine_torch.cpython-312-x86_64-linux-gnu.so").touch()
    assert probe().package("transformer-engine").is_usable
    assert "transformer_engine" not in sys.modules


def test_a_module_without_metadata_is_not_installed(install, tmp_path):
    (tmp_path / "torchao.py").write_text("")
    assert probe().package("torchao") == Package("torchao")


def test_a_probe_imports_none_of_the_optional_packages():
    look = f"print({{*{MODULES!r}}} & {{*sys.modules}})"
    code = f"import sys, automodel_fn; automodel_fn.probe(); {look}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
