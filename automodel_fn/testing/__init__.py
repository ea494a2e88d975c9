"""Strategies and laws for property tests of your own models; needs hypothesis."""

from automodel_fn.errors import BackendUnavailableError

try:
    import hypothesis  # noqa: F401 # pyright: ignore[reportUnusedImport] - to say what is missing
except ModuleNotFoundError as error:
    raise BackendUnavailableError(
        "automodel_fn.testing needs hypothesis, which is not installed; "
        "run pip install 'automodel_fn[testing]'."
    ) from error

from automodel_fn.testing._laws_atomic import InjectedError, InjectedInterrupt, check_all_or_nothing
from automodel_fn.testing._laws_cast import check_aliases_kept, check_cast_exact
from automodel_fn.testing._laws_frozen import check_frozen_plan
from automodel_fn.testing._laws_inverse import check_inverse, check_undo
from automodel_fn.testing._laws_kernels import (
    check_rms_norm_residual,
    check_rms_norm_scale,
    check_swiglu,
)
from automodel_fn.testing._laws_loss import check_lm_head_loss
from automodel_fn.testing._laws_notes import check_notes
from automodel_fn.testing._laws_ops import (
    check_lm_head_logits,
    check_rms_norm,
    check_rope_config,
)
from automodel_fn.testing._laws_optimizers import check_training_goes_on
from automodel_fn.testing._laws_patch import check_patch_passes_step, check_patch_reversible
from automodel_fn.testing._laws_plan import check_plan_is_pure
from automodel_fn.testing._laws_resolve import check_resolve
from automodel_fn.testing._laws_rope import check_relative_positions, check_rope
from automodel_fn.testing._laws_step import StepScopeMachine
from automodel_fn.testing._laws_swap import check_swaps
from automodel_fn.testing._laws_temporary import check_temporary_cast
from automodel_fn.testing._stand_ins import te_stand_ins
from automodel_fn.testing._strategies_arguments import pin_patterns, step_contexts
from automodel_fn.testing._strategies_backends import (
    availabilities,
    backend_configs,
    cpu_backends,
)
from automodel_fn.testing._strategies_loss import lm_head_loss_arguments
from automodel_fn.testing._strategies_models import models
from automodel_fn.testing._strategies_ops import (
    lm_head_arguments,
    norm_arguments,
    residual_arguments,
    rope_parameters,
    swiglu_arguments,
)
from automodel_fn.testing._strategies_rope import rope_arguments
from automodel_fn.testing._strategies_tensors import dtypes, tensors

__all__ = [
    "InjectedError",
    "InjectedInterrupt",
    "StepScopeMachine",
    "availabilities",
    "backend_configs",
    "check_aliases_kept",
    "check_all_or_nothing",
    "check_cast_exact",
    "check_frozen_plan",
    "check_inverse",
    "check_lm_head_logits",
    "check_lm_head_loss",
    "check_notes",
    "check_patch_passes_step",
    "check_patch_reversible",
    "check_plan_is_pure",
    "check_relative_positions",
    "check_resolve",
    "check_rms_norm",
    "check_rms_norm_residual",
    "check_rms_norm_scale",
    "check_rope",
    "check_rope_config",
    "check_swaps",
    "check_swiglu",
    "check_temporary_cast",
    "check_training_goes_on",
    "check_undo",
    "cpu_backends",
    "dtypes",
    "lm_head_arguments",
    "lm_head_loss_arguments",
    "models",
    "norm_arguments",
    "pin_patterns",
    "residual_arguments",
    "rope_arguments",
    "rope_parameters",
    "step_contexts",
    "swiglu_arguments",
    "te_stand_ins",
    "tensors",
]
