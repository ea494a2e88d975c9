"""Functions on tensors and on configs, stateless, each beside its plain reference."""

from automodel_fn.ops._logits import LMHeadOutput, lm_head_logits
from automodel_fn.ops._logits_product import LogitsPath, logits_path
from automodel_fn.ops._rms_norm import rms_norm_fp32
from automodel_fn.ops._rope import RopeConfig, rope_config
from automodel_fn.ops._weight_parts import WeightParts, weight_parts

__all__ = [
    "LMHeadOutput",
    "LogitsPath",
    "RopeConfig",
    "WeightParts",
    "lm_head_logits",
    "logits_path",
    "rms_norm_fp32",
    "rope_config",
    "weight_parts",
]
