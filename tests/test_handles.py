import pytest

from automodel_fn.handles import Handle


class Counting(Handle):
    def __init__(self):
        self.removed = 0

    def remove(self):
        self.removed += 1


def test_a_block_gives_the_handle_and_removes_it_at_its_end():
    with Counting() as handle:
        assert isinstance(handle, Counting)
        assert handle.removed == 0
    assert handle.removed == 1


def test_an_error_in_the_block_removes_it_and_goes_on():
    handle = Counting()
    with pytest.raises(KeyError), handle:
        raise KeyError
    assert handle.removed == 1


def test_a_handle_says_how_it_is_removed():
    with pytest.raises(TypeError, match="remove"):
        type("Forgetful", (Handle,), {})()
