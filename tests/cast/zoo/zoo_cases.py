"""The classes of transformers that declare fp32 pins, each with a concrete class of its family."""

import contextlib
import functools
import importlib

import torch
import transformers
from zoo_overrides import OVERRIDES
from zoo_shrink import small_config

from automodel_fn import cast_plan

VERSION = "5.24.0"
"""The version of transformers that this table is about."""

ITSELF = None

FAMILIES = {
    "afmoe": {"AfmoePreTrainedModel": "AfmoeForCausalLM"},
    "apertus1p5": {"Apertus1p5PreTrainedModel": "Apertus1p5ForConditionalGeneration"},
    "axk1": {"AXK1PreTrainedModel": "AXK1ForCausalLM"},
    "axk2": {"AXK2PreTrainedModel": "AXK2ForCausalLM"},
    "bailing_hybrid": {"BailingHybridPreTrainedModel": "BailingHybridForCausalLM"},
    "beam": {"BeamPreTrainedModel": "BeamForCausalLM"},
    "blip_2": {
        "Blip2Model": ITSELF,
        "Blip2TextModelWithProjection": ITSELF,
        "Blip2VisionModelWithProjection": ITSELF,
        "Blip2ForConditionalGeneration": ITSELF,
        "Blip2ForImageTextRetrieval": ITSELF,
    },
    "deepseek_ocr2": {"DeepseekOcr2TextPreTrainedModel": "DeepseekOcr2ForConditionalGeneration"},
    "deepseek_v2": {"DeepseekV2PreTrainedModel": "DeepseekV2ForCausalLM"},
    "deepseek_v3": {"DeepseekV3PreTrainedModel": "DeepseekV3ForCausalLM"},
    "deepseek_v32": {"DeepseekV32PreTrainedModel": "DeepseekV32ForCausalLM"},
    "deepseek_v4": {"DeepseekV4PreTrainedModel": "DeepseekV4ForCausalLM"},
    "dots1": {"Dots1PreTrainedModel": "Dots1ForCausalLM"},
    "dots3_note": {
        "Dots3NotePreTrainedModel": "Dots3NoteForConditionalGeneration",
        "Dots3NoteVisionPreTrainedModel": "Dots3NoteForConditionalGeneration",
    },
    "ernie4_5_moe": {"Ernie4_5_MoePreTrainedModel": "Ernie4_5_MoeForCausalLM"},
    "ernie4_5_vl_moe": {"Ernie4_5_VLMoePreTrainedModel": "Ernie4_5_VLMoeForConditionalGeneration"},
    "esmfold2": {"EsmFold2PreTrainedModel": "EsmFold2Model"},
    "exaone_moe": {"ExaoneMoePreTrainedModel": "ExaoneMoeForCausalLM"},
    "flint": {"FlintPreTrainedModel": "FlintForCausalLM"},
    "glm4_moe": {"Glm4MoePreTrainedModel": "Glm4MoeForCausalLM"},
    "glm4_moe_lite": {"Glm4MoeLitePreTrainedModel": "Glm4MoeLiteForCausalLM"},
    "glm4v_moe": {"Glm4vMoePreTrainedModel": "Glm4vMoeForConditionalGeneration"},
    "glm5_next": {"Glm5NextPreTrainedModel": "Glm5NextForConditionalGeneration"},
    "glm_moe_dsa": {"GlmMoeDsaPreTrainedModel": "GlmMoeDsaForCausalLM"},
    "gpt_oss": {"GptOssPreTrainedModel": "GptOssForCausalLM"},
    "gradium_phonon_tts": {"GradiumPhononTTSForConditionalGeneration": ITSELF},
    "granite_speech5": {"GraniteSpeech5PreTrainedModel": "GraniteSpeech5ForCTC"},
    "hy_v3": {"HYV3PreTrainedModel": "HYV3ForCausalLM"},
    "hy_v4": {"HYV4PreTrainedModel": "HYV4ForCausalLM", "HYV4ForCausalLM": ITSELF},
    "hy_v4_vl": {
        "HYV4VLPreTrainedModel": "HYV4VLForConditionalGeneration",
        "HYV4VLForConditionalGeneration": ITSELF,
    },
    "inkling": {"InklingPreTrainedModel": "InklingForConditionalGeneration"},
    "inkling2": {"Inkling2PreTrainedModel": "Inkling2ForConditionalGeneration"},
    "inkling2_loop": {"Inkling2LoopPreTrainedModel": "Inkling2LoopForConditionalGeneration"},
    "instructblip": {"InstructBlipModel": ITSELF, "InstructBlipForConditionalGeneration": ITSELF},
    "instructblipvideo": {
        "InstructBlipVideoModel": ITSELF,
        "InstructBlipVideoForConditionalGeneration": ITSELF,
    },
    "kimi_linear": {"KimiLinearPreTrainedModel": "KimiLinearForCausalLM"},
    "kolibri1": {"Kolibri1PreTrainedModel": "Kolibri1ForCausalLM"},
    "kyutai_speech_to_text": {"KyutaiSpeechToTextForConditionalGeneration": ITSELF},
    "longcat_flash": {"LongcatFlashPreTrainedModel": "LongcatFlashForCausalLM"},
    "mimo_v2_flash": {"MiMoV2FlashPreTrainedModel": "MiMoV2FlashForCausalLM"},
    "mistral_large4": {"MistralLarge4PreTrainedModel": "MistralLarge4ForConditionalGeneration"},
    "mt5": {"MT5PreTrainedModel": "MT5ForConditionalGeneration"},
    "muse_spark": {"MuseSparkPreTrainedModel": "MuseSparkForConditionalGeneration"},
    "nemotron3_5_transcribe": {"Nemotron3_5TranscribeModel": ITSELF},
    "nemotron_h": {"NemotronHPreTrainedModel": "NemotronHForCausalLM"},
    "openai_privacy_filter": {
        "OpenAIPrivacyFilterPreTrainedModel": "OpenAIPrivacyFilterForTokenClassification"
    },
    "pocket_tts": {"PocketTTSForConditionalGeneration": ITSELF},
    "pop2piano": {"Pop2PianoPreTrainedModel": "Pop2PianoForConditionalGeneration"},
    "rwkv": {"RwkvPreTrainedModel": "RwkvForCausalLM"},
    "slanext": {"SLANeXtPreTrainedModel": "SLANeXtForTableRecognition"},
    "solar_open": {"SolarOpenPreTrainedModel": "SolarOpenForCausalLM"},
    "t5": {"T5PreTrainedModel": "T5ForConditionalGeneration"},
    "udop": {"UdopPreTrainedModel": "UdopForConditionalGeneration"},
    "umt5": {"UMT5PreTrainedModel": "UMT5ForConditionalGeneration"},
    "unlimited_ocr": {"UnlimitedOcrTextPreTrainedModel": "UnlimitedOcrForConditionalGeneration"},
    "voxtral": {"VoxtralForConditionalGeneration": ITSELF},
}
"""Family to its declaring classes, each with the concrete class that is built for it."""

CASES = {
    f"{family}.{declaring}": concrete or declaring
    for family, classes in FAMILIES.items()
    for declaring, concrete in classes.items()
}

ARCHITECTURES = tuple({concrete: case for case, concrete in reversed(CASES.items())}.values())[::-1]
"""The cases without those that build the same class again."""

CONSTRUCTED = {"esmfold2.EsmFold2PreTrainedModel": {"parcae.log_delta"}}
"""Tensors that a class constructs in float32 whatever the default dtype is, and no keyword names.

transformers loads these in float32; a plan for a model that is built in float32 cannot see it.
"""

RETYPED = {
    "granite_speech5.GraniteSpeech5PreTrainedModel": {
        f"encoder.layers.{index}.conv.norm.num_batches_tracked" for index in range(2)
    }
}
"""Integers that transformers loads in float32, because a keyword matches them."""


def is_version_of_the_table():
    return transformers.__version__ == VERSION


def module_of(case):
    family = case.partition(".")[0]
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def is_in_this_version(case):
    try:
        return hasattr(module_of(case), CASES[case])
    except ImportError:
        return False


def architecture_of(case):
    return getattr(module_of(case), CASES[case])


def build(case, device="meta", dtype=torch.float32):
    """The small model of a case; its parameters are built in `dtype`, as transformers loads."""
    architecture = architecture_of(case)
    overrides = OVERRIDES.get(case, OVERRIDES.get(case.partition(".")[0]))
    config = small_config(architecture.config_class, overrides)
    with torch.device(device), _default_dtype(dtype):
        return architecture(config)


@functools.cache
def on_meta(case):
    """One model for all that only reads it."""
    return build(case)


@functools.cache
def plan_of(case, dtype, match):
    return cast_plan(on_meta(case), dtype, match=match)


@contextlib.contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
