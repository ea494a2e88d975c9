"""Functions on tensors and on configs, stateless, each beside its plain reference."""

from automodel_fn.ops._logits import LMHeadOutput, lm_head_logits
from automodel_fn.ops._rms_norm import rms_norm_fp32
from automodel_fn.ops._rope import RopeConfig, rope_config

__all__ = ["LMHeadOutput", "RopeConfig", "lm_head_logits", "rms_norm_fp32", "rope_config"]
