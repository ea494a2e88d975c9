from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from automodel_fn import current_step


class SeeingBlock:
    def __init__(self):
        self.seen = []

    def __call__(self, x):
        self.seen.append(current_step())
        return x.sin()


@pytest.fixture
def block():
    return SeeingBlock()


@pytest.fixture
def leaf():
    return torch.ones(2, requires_grad=True)


@pytest.fixture
def in_thread():
    def run(function, *args):
        with ThreadPoolExecutor(1) as new_thread:
            return new_thread.submit(function, *args).result()

    return run
