import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from automodel_fn import StepContext
from automodel_fn.testing import (
    check_patch_passes_step,
    check_patch_reversible,
    step_contexts,
    te_stand_ins,
)

FIRST, LATER = StepContext(True), StepContext(False)
actions = st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=12)
calls = st.sampled_from(("forward", "forward", "checkpoint", None, True, False))
others = st.sampled_from(("leave", "change", "backward"))
events = st.lists(st.one_of(step_contexts(), calls, calls, others), max_size=20)


def outputs_of(classes):
    torch.manual_seed(0)
    layer, norm = classes.linear(4, 4), classes.rms_norm(4)
    block = classes.transformer_layer(4, 8, 2)
    inp = torch.linspace(-1, 1, 12).view(3, 1, 4)

    def outputs():
        return [
            layer(inp, is_first_microbatch=None),
            layer(inp, None),
            block(inp, is_first_microbatch=None),
            norm(inp),
        ]

    return outputs


@given(actions)
@example([])
@example([None, 0])
@example([None, None, 0, 0])
@example([None, None, 1, None, 0, 0, None])
@example([3, None, 3])
def test_the_patch_is_undone_in_whatever_order(actions):
    classes = te_stand_ins()
    check_patch_reversible(classes, actions, outputs_of(classes))


def test_the_patch_is_undone_where_a_class_has_a_wrapper_of_someone_else():
    classes = te_stand_ins()
    forward = classes.layer_norm.forward
    classes.layer_norm.forward = lambda self, *args, **kwargs: forward(self, *args, **kwargs)
    check_patch_reversible(classes)


@given(events)
@example([FIRST, "forward", "change", LATER, "forward", "leave", "forward"])
@example([FIRST, "checkpoint", LATER, "change", "backward", "forward"])
@example([FIRST, "forward", "change", False, None, "forward"])
@example([LATER, "checkpoint", FIRST, "checkpoint", "leave", "leave", "change", "backward"])
@example([FIRST, StepContext(optim_step=True), "forward", "change", LATER, "forward"])
def test_a_patched_forward_is_given_the_step_of_its_scope(events):
    check_patch_passes_step(events)


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_a_training_loop_quantizes_once_a_step(num_microbatches):
    step = [FIRST, "forward", "leave", *[LATER, "forward", "leave"] * (num_microbatches - 1)]
    check_patch_passes_step([*step, "change", *step, "change", "forward", *step])
