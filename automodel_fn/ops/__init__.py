"""Functions on tensors and on configs, stateless, each beside its plain reference."""

from automodel_fn.ops._apply_rope import apply_rope
from automodel_fn.ops._choice import KernelChoice
from automodel_fn.ops._logits import LMHeadOutput, lm_head_logits
from automodel_fn.ops._rms_norm import rms_norm_fp32, rms_norm_kernel
from automodel_fn.ops._rope import RopeConfig, rope_config
from automodel_fn.ops._rope_eager import rope_kernel
from automodel_fn.ops._rope_tables import RopeTables, rope_tables
from automodel_fn.ops._swiglu import swiglu, swiglu_kernel

__all__ = [
    "KernelChoice",
    "LMHeadOutput",
    "RopeConfig",
    "RopeTables",
    "apply_rope",
    "lm_head_logits",
    "rms_norm_fp32",
    "rms_norm_kernel",
    "rope_config",
    "rope_kernel",
    "rope_tables",
    "swiglu",
    "swiglu_kernel",
]
