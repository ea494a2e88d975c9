import io
import sys

import pytest
import torch
from rich.console import Console

from automodel_fn.cli import main
from automodel_fn.cli._display import Display
from automodel_fn.cli._settings import TrainSettings
from automodel_fn.cli._train import train


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them wait for each other on tensors as small as here
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture
def settings(tmp_path, text_file):
    def make(**changes):
        tiny = {"steps": 2, "microbatches": 2, "batch_size": 1, "seq_len": 32}
        return TrainSettings(**({**tiny, "data": (text_file,), "out": tmp_path / "run"} | changes))

    return make


@pytest.fixture
def trained(settings):
    def run(cast=None, **changes):
        display = Display(Console(file=io.StringIO(), width=120))
        asked = settings(**changes)
        return train(asked, display) if cast is None else train(asked, display, cast)

    return run


@pytest.fixture
def cli(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["automodel-fn", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def checkpoint(tmp_path):
    def make(config, name="checkpoint"):
        folder = tmp_path / name
        config.save_pretrained(folder)
        return folder

    return make
