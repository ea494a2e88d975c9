"""Functions on tensors and on configs, stateless, each beside its plain reference."""

from automodel_fn.ops._apply_rope import apply_rope
from automodel_fn.ops._choice import KernelChoice
from automodel_fn.ops._logits import LMHeadOutput, lm_head_logits
from automodel_fn.ops._logits_product import LogitsPath, logits_path
from automodel_fn.ops._loss import LMHeadLoss, lm_head_loss, lm_head_loss_kernel
from automodel_fn.ops._rms_norm import rms_norm_fp32, rms_norm_kernel
from automodel_fn.ops._rope import RopeConfig, rope_config
from automodel_fn.ops._rope_kernel import rope_kernel
from automodel_fn.ops._rope_tables import RopeTables, rope_tables
from automodel_fn.ops._swiglu import swiglu, swiglu_kernel
from automodel_fn.ops._weight_parts import WeightParts, weight_parts

__all__ = [
    "KernelChoice",
    "LMHeadLoss",
    "LMHeadOutput",
    "LogitsPath",
    "RopeConfig",
    "RopeTables",
    "WeightParts",
    "apply_rope",
    "lm_head_logits",
    "lm_head_loss",
    "lm_head_loss_kernel",
    "logits_path",
    "rms_norm_fp32",
    "rms_norm_kernel",
    "rope_config",
    "rope_kernel",
    "rope_tables",
    "swiglu",
    "swiglu_kernel",
    "weight_parts",
]
