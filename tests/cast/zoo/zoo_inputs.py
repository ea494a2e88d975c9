"""Tiny inputs for the forward of a small model: text for most, and what the others ask for."""

import inspect

import torch

from automodel_fn import bf16

IDS = torch.arange(40, 46).repeat(2, 1)


def inputs_for(model):
    """Keywords for `model(...)`; what is floating is bf16, as a loader of a bf16 run gives it."""
    given = inspect.signature(model.forward).parameters
    own = OWN.get(type(model).__name__, lambda _: {})(model)
    usual = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS % 2}
    if model.config.is_encoder_decoder:
        usual["decoder_input_ids"] = IDS
    values = {name: value for name, value in usual.items() if name in given} | own
    return {name: value for name, value in values.items() if value is not None}


def floats(*shape):
    return torch.randn(*shape).to(bf16)


def with_placeholders(token, count):
    ids = torch.cat([torch.full((2, count), token), IDS], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 2}


def _image(model):
    return {"pixel_values": floats(2, 3, 8, 8)}


def _queried(model):
    count = model.config.num_query_tokens
    return _image(model) | with_placeholders(model.config.image_token_index, count)


def _instructed(model, frames=1):
    count = model.config.num_query_tokens * frames
    token = getattr(model.config, "video_token_index", None) or model.config.image_token_index
    values = with_placeholders(token, count)
    pixels = floats(2, 3, 8, 8) if frames == 1 else floats(2, frames, 3, 8, 8)
    return values | {"pixel_values": pixels, "qformer_input_ids": IDS}


def _apertus(model):
    config = model.config
    images = torch.full((2, 16), config.image_token_id)
    audio = torch.full((2, 4), config.audio_token_id)
    ids = torch.cat([images, audio, IDS], dim=1)
    ids = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 2}
    sizes = {"image_sizes": torch.tensor([[8, 8]] * 2)}
    return (
        ids
        | sizes
        | {
            "pixel_values": floats(2, 3, 8, 8),
            "input_values": floats(2, 1, 16),
            "padding_mask": torch.ones(2, 16, dtype=torch.long),
        }
    )


def _voxtral(model):
    ids = with_placeholders(model.config.audio_token_id, 8)
    return ids | {"input_features": floats(2, 4, 16)}


def _nemotron(model):
    ids = with_placeholders(model.config.audio_token_id, 2)
    mask = torch.ones(2, 16, dtype=torch.long)
    return ids | {"input_features": floats(2, 16, 4), "input_features_mask": mask}


def _latents(model):
    config = model.config
    ids = torch.tensor([[40, 41, config.audio_bos_token_id, *[config.audio_latent_token_id] * 3]])
    ids = ids.repeat(2, 1)
    labels = floats(2, 3, config.latent_dim)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _protein(model):
    from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2AtomInputs

    tokens = torch.arange(4).repeat(2, 1)
    same, ones = torch.zeros_like(tokens), torch.ones_like(tokens)
    atoms = EsmFold2AtomInputs(
        ref_pos=torch.randn(2, 4, 3),
        ref_charge=torch.zeros(2, 4),
        atom_attention_mask=ones.bool(),
        ref_element=ones,
        ref_atom_name_chars=torch.ones(2, 4, model.config.max_chars, dtype=torch.long),
        ref_space_uid=tokens,
        atom_to_token=tokens,
    )
    ids = {"token_index": tokens, "residue_index": tokens, "mol_type": same, "res_type": ones + 1}
    ids |= dict.fromkeys(("asym_id", "sym_id", "entity_id"), same)
    bonds = {
        "token_bonds": torch.zeros(2, 4, 4, 1),
        "attention_mask": ones.bool(),
        "atom_inputs": atoms,
    }
    return ids | bonds | {"input_ids": ones + 4}


def more_of(model):
    """What a part returns that a model's own forward does not call."""
    if type(model).__name__ == "KyutaiSpeechToTextForConditionalGeneration":
        return [model.codec_model(floats(2, 1, 16)).audio_values]
    return []


OWN = {
    "Apertus1p5ForConditionalGeneration": _apertus,
    "Blip2Model": _queried,
    "Blip2ForConditionalGeneration": _queried,
    "Blip2VisionModelWithProjection": _image,
    "Blip2ForImageTextRetrieval": _image,
    "EsmFold2Model": _protein,
    "GradiumPhononTTSForConditionalGeneration": _latents,
    "GraniteSpeech5ForCTC": lambda _: {
        "input_features": floats(2, 8, 16),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "labels": IDS[:, :1],
    },
    "InstructBlipModel": _instructed,
    "InstructBlipForConditionalGeneration": _instructed,
    "InstructBlipVideoModel": lambda model: _instructed(model, frames=2),
    "InstructBlipVideoForConditionalGeneration": lambda model: _instructed(model, frames=2),
    "KyutaiSpeechToTextForConditionalGeneration": lambda model: {
        "input_ids": torch.ones(2, 6, 1 + model.config.num_codebooks, dtype=torch.long)
    },
    "Nemotron3_5TranscribeModel": _nemotron,
    "PocketTTSForConditionalGeneration": _latents,
    "SLANeXtForTableRecognition": _image,
    "UdopForConditionalGeneration": lambda _: {"bbox": torch.zeros(2, 6, 4)},
    "VoxtralForConditionalGeneration": _voxtral,
}
"""Architectures that take more than text; None leaves out what would be given otherwise."""
