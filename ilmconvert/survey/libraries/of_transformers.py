"""Hugging Face transformers: one small model of each kind, built from its config; nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from torch import nn

from ilmconvert.graph import Inputs

__all__ = ["build", "inputs", "names", "needs_values"]

Kind = Literal["image", "text", "both", "text to text", "audio", "features"]
_TEXT = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_IMAGE = {**{k: v for k, v in _TEXT.items() if k != "vocab_size"}, "image_size": 64, "patch_size": 16}
_STAGES = {"hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1]}
_LLAMA = {**_TEXT, "num_key_value_heads": 2}
_T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}


@dataclass(frozen=True)
class _Model:
    """The prefix of its config class, the model class, arguments of the config, and what it is called with."""

    config: str
    model: str
    kind: Kind
    arguments: dict[str, Any] = field(default_factory=dict)
    side: int = 64


_MODELS = {
    "albert": _Model("Albert", "AlbertModel", "text", {**_TEXT, "embedding_size": 32}),
    "bart": _Model("Bart", "BartModel", "text to text", _SEQ2SEQ),
    "beit": _Model("Beit", "BeitForImageClassification", "image", _IMAGE),
    "bert": _Model("Bert", "BertForSequenceClassification", "text", _TEXT),
    "bit": _Model("Bit", "BitForImageClassification", "image", {**_STAGES, "embedding_size": 32, "num_groups": 8}),
    "bloom": _Model(
        "Bloom", "BloomForCausalLM", "text", {"vocab_size": 99, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    ),
    "clip_text": _Model("CLIPText", "CLIPTextModel", "text", _TEXT),
    "clip_vision": _Model("CLIPVision", "CLIPVisionModel", "image", _IMAGE),
    "convnext": _Model("ConvNext", "ConvNextForImageClassification", "image", _STAGES),
    "convnextv2": _Model("ConvNextV2", "ConvNextV2ForImageClassification", "image", _STAGES),
    "deberta_v2": _Model("DebertaV2", "DebertaV2Model", "text", _TEXT),
    "deit": _Model("DeiT", "DeiTForImageClassification", "image", _IMAGE),
    "dinov2": _Model(
        "Dinov2", "Dinov2ForImageClassification", "image", {k: v for k, v in _IMAGE.items() if k != "intermediate_size"}
    ),
    "distilbert": _Model(
        "DistilBert",
        "DistilBertModel",
        "text",
        {"vocab_size": 99, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    ),
    "electra": _Model("Electra", "ElectraModel", "text", {**_TEXT, "embedding_size": 32}),
    "gemma": _Model("Gemma", "GemmaForCausalLM", "text", {**_LLAMA, "head_dim": 16}),
    "gemma2": _Model("Gemma2", "Gemma2ForCausalLM", "text", {**_LLAMA, "head_dim": 16}),
    "gpt2": _Model("GPT2", "GPT2LMHeadModel", "text", {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gpt_neox": _Model("GPTNeoX", "GPTNeoXForCausalLM", "text", _TEXT),
    "llama": _Model("Llama", "LlamaForCausalLM", "text", _LLAMA),
    "mistral": _Model("Mistral", "MistralForCausalLM", "text", {**_LLAMA, "head_dim": 16}),
    "mobilenet_v2": _Model("MobileNetV2", "MobileNetV2ForImageClassification", "image", {"depth_multiplier": 0.5}),
    "mobilevit": _Model("MobileViT", "MobileViTForImageClassification", "image", {"image_size": 64}),
    "olmo2": _Model("Olmo2", "Olmo2ForCausalLM", "text", _LLAMA),
    "opt": _Model(
        "OPT",
        "OPTForCausalLM",
        "text",
        {
            "vocab_size": 99,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "word_embed_proj_dim": 64,
        },
    ),
    "phi": _Model("Phi", "PhiForCausalLM", "text", _TEXT),
    "poolformer": _Model(
        "PoolFormer",
        "PoolFormerForImageClassification",
        "image",
        {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1]},
    ),
    "qwen2": _Model("Qwen2", "Qwen2ForCausalLM", "text", _LLAMA),
    "qwen3": _Model("Qwen3", "Qwen3ForCausalLM", "text", {**_LLAMA, "head_dim": 16}),
    "regnet": _Model(
        "RegNet",
        "RegNetForImageClassification",
        "image",
        {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "groups_width": 16, "embedding_size": 32},
    ),
    "resnet": _Model("ResNet", "ResNetForImageClassification", "image", {**_STAGES, "embedding_size": 32}),
    "roberta": _Model("Roberta", "RobertaModel", "text", _TEXT),
    "segformer": _Model(
        "Segformer",
        "SegformerForSemanticSegmentation",
        "image",
        {"hidden_sizes": [16, 32, 32, 64], "decoder_hidden_size": 32},
    ),
    "squeezebert": _Model("SqueezeBert", "SqueezeBertModel", "text", {**_TEXT, "embedding_size": 64}),
    "swin": _Model(
        "Swin",
        "SwinForImageClassification",
        "image",
        {"image_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "swinv2": _Model(
        "Swinv2",
        "Swinv2ForImageClassification",
        "image",
        {"image_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "t5": _Model("T5", "T5ForConditionalGeneration", "text to text", _T5),
    "vit": _Model("ViT", "ViTForImageClassification", "image", _IMAGE),
    "wav2vec2": _Model("Wav2Vec2", "Wav2Vec2Model", "audio", _TEXT),
    "whisper": _Model(
        "Whisper",
        "WhisperModel",
        "features",
        {
            **_SEQ2SEQ,
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": [],
        },
    ),
}


def names() -> list[str]:
    """The kinds of models."""
    return list(_MODELS)


def build(name: str) -> nn.Module:
    """With fresh weights."""
    made = _MODELS[name]
    config = getattr(transformers, f"{made.config}Config")(**made.arguments)
    return getattr(transformers, made.model)(config)  # type: ignore[no-any-return]


def inputs(name: str, model: nn.Module, batch_size: int, *, training: bool) -> Inputs:
    """Keyword arguments: pixel values, token ids or sound, and labels where that is how it is trained."""
    made, device = _MODELS[name], next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (batch_size, 12), generator=generator).to(device)
    if made.kind == "image":
        pixels = torch.randn(batch_size, 3, made.side, made.side, generator=generator).to(device)
        return Inputs((), {"pixel_values": pixels})
    if made.kind == "audio":
        return Inputs((), {"input_values": torch.randn(batch_size, 8000, generator=generator).to(device)})
    if made.kind == "features":
        sound = torch.randn(batch_size, 16, 64, generator=generator).to(device)
        return Inputs((), {"input_features": sound, "decoder_input_ids": ids})
    if made.kind == "text to text":
        return Inputs((), {"input_ids": ids, "decoder_input_ids": ids})
    return Inputs((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def needs_values(name: str) -> bool:
    """Masks and caches look at values; the models are small."""
    return True
