"""All rules, in the order in which a module's entries stand in a plan."""

from __future__ import annotations

from collections.abc import Mapping

from automodel_fn.convert._compiled import COMPILE_ATTN_RULE
from automodel_fn.convert._experts import GROUPED_EXPERTS_RULE
from automodel_fn.convert._fp8_blocks import TE_FP8_RULE
from automodel_fn.convert._masks import ASYNC_MASKS_RULE
from automodel_fn.convert._mlps import SWIGLU_RULE
from automodel_fn.convert._ropes import ROPE_RULE
from automodel_fn.convert._rule_configs import ATTENTION, EXPERTS, ConfigRule
from automodel_fn.convert._rule_gates import FAKE_GATE_RULE, GATE_PRECISION_RULE
from automodel_fn.convert._rule_head import HEAD_RULE
from automodel_fn.convert._rule_linear import LINEAR_RULE
from automodel_fn.convert._rule_loss import LOSS_RULE
from automodel_fn.convert._rule_norm import RMS_NORM_RULE
from automodel_fn.convert._rules import Rule
from automodel_fn.convert._te_attention import TE_ATTENTION_RULE

MODULE_RULES: Mapping[str, Rule] = {
    rule.field: rule
    for rule in (
        LINEAR_RULE,
        RMS_NORM_RULE,
        ROPE_RULE,
        TE_ATTENTION_RULE,
        ASYNC_MASKS_RULE,
        SWIGLU_RULE,
        GROUPED_EXPERTS_RULE,
        GATE_PRECISION_RULE,
        FAKE_GATE_RULE,
        HEAD_RULE,
        LOSS_RULE,
        COMPILE_ATTN_RULE,
        TE_FP8_RULE,
    )
}
CONFIG_RULES: Mapping[str, ConfigRule] = {rule.field: rule for rule in (ATTENTION, EXPERTS)}
