r"""Hugging Face transformers' own norm classes.

Each of its models brings a copy of a few formulas under a class name of its own. In all of them the statistics are
taken in float32; what differs is where the result is cast back, and, in Gemma's, that the scale is ``1 + weight``. Its
ILM layer holds the sum, so that a weight decay pulls it to 0 and not to 1.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ilmconvert.nn.functional import Standardization
from ilmconvert.norms.batch import Batch
from ilmconvert.norms.layer import Layer, Layer2d
from ilmconvert.norms.registry import NormHandler, register
from ilmconvert.norms.spec import NormSpec


def _names(text: str) -> tuple[str, ...]:
    """``llama.LlamaRMSNorm`` is defined in ``transformers.models.llama.modeling_llama``."""
    pairs = (name.split(".") for name in text.split())
    return tuple(f"transformers.models.{package}.modeling_{package}.{cls}" for package, cls in pairs)


_SCALED_AFTER_CAST = _names(
    """
    aimv2.Aimv2RMSNorm apertus.ApertusRMSNorm arcee.ArceeRMSNorm aria.AriaTextRMSNorm axk1.AXK1RMSNorm
    axk2.AXK2RMSNorm bailing_hybrid.BailingHybridRMSNorm bamba.BambaRMSNorm bitnet.BitNetRMSNorm blt.BltRMSNorm
    chameleon.ChameleonRMSNorm clvp.ClvpRMSNorm cohere2_moe.Cohere2MoeRMSNorm
    cosmos3_edge.Cosmos3EdgeTextRMSNorm csm.CsmRMSNorm cwm.CwmRMSNorm deepseek_ocr2.DeepseekOcr2TextRMSNorm
    deepseek_ocr2.DeepseekOcr2VisionRMSNorm deepseek_v2.DeepseekV2RMSNorm deepseek_v3.DeepseekV3RMSNorm
    deepseek_v32.DeepseekV32RMSNorm deimv2.Deimv2RMSNorm dia.DiaRMSNorm diffllama.DiffLlamaRMSNorm
    doge.DogeRMSNorm dots1.Dots1RMSNorm dots3_note.Dots3NoteRMSNorm emu3.Emu3RMSNorm ernie4_5.Ernie4_5RMSNorm
    ernie4_5_moe.Ernie4_5_MoeRMSNorm ernie4_5_vl_moe.Ernie4_5_VLMoeRMSNorm eurobert.EuroBertRMSNorm
    evolla.EvollaRMSNorm exaone4.Exaone4RMSNorm exaone4_5.Exaone4_5_RMSNorm exaone_moe.ExaoneMoeRMSNorm
    falcon_h1.FalconH1RMSNorm falcon_mamba.FalconMambaRMSNorm glm.GlmRMSNorm glm4.Glm4RMSNorm
    glm4_moe.Glm4MoeRMSNorm glm4_moe_lite.Glm4MoeLiteRMSNorm glm4v.Glm4vRMSNorm glm4v_moe.Glm4vMoeRMSNorm
    glm4v_moe.Glm4vMoeTextRMSNorm glm5_next.Glm5NextRMSNorm glm5_next.Glm5NextTextRMSNorm
    glm_image.GlmImageRMSNorm glm_moe_dsa.GlmMoeDsaRMSNorm glm_ocr.GlmOcrRMSNorm granite.GraniteRMSNorm
    granite4_vision.Granite4VisionTextRMSNorm granite_docling.GraniteDoclingTextRMSNorm
    granite_swa.GraniteSWARMSNorm granitemoe.GraniteMoeRMSNorm granitemoe_swa.GraniteMoeSWARMSNorm
    granitemoehybrid.GraniteMoeHybridRMSNorm granitemoeshared.GraniteMoeSharedRMSNorm
    higgs_audio_v2.HiggsAudioV2RMSNorm hunyuan_v1_dense.HunYuanDenseV1RMSNorm hunyuan_v1_moe.HunYuanMoEV1RMSNorm
    hunyuan_vl.HunYuanVLRMSNorm hy_v3.HYV3RMSNorm hy_v4.HYV4RMSNorm hyperclovax.HyperCLOVAXRMSNorm
    idefics2.Idefics2RMSNorm idefics3.Idefics3RMSNorm inkling.InklingRMSNorm internvl.InternVLVisionRMSNorm
    jamba.JambaRMSNorm jetmoe.JetMoeRMSNorm kimi_linear.KimiLinearRMSNorm kolibri1.Kolibri1RMSNorm
    laguna.LagunaRMSNorm lfm2.Lfm2RMSNorm lfm2_moe.Lfm2MoeRMSNorm lfm3.Lfm3RMSNorm lfm3_vl.Lfm3VlVisionRMSNorm
    lighton_ocr.LightOnOcrRMSNorm llama.LlamaRMSNorm llama4.Llama4TextRMSNorm longcat_flash.LongcatFlashRMSNorm
    mamba.MambaRMSNorm mamba2.Mamba2RMSNorm mellum.MellumRMSNorm mimo_v2_flash.MiMoV2FlashRMSNorm
    minicpm3.MiniCPM3RMSNorm minimax.MiniMaxRMSNorm minimax_m2.MiniMaxM2RMSNorm ministral.MinistralRMSNorm
    ministral3.Ministral3RMSNorm mistral.MistralRMSNorm mistral3.Mistral3RMSNorm mistral4.Mistral4RMSNorm
    mistral_large4.MistralLarge4RMSNorm mixtral.MixtralRMSNorm mllama.MllamaTextRMSNorm molmo2.Molmo2RMSNorm
    muse_glimmer_assistant.MuseGlimmerAssistantRMSNorm neucodec.NeuCodecRMSNorm olmoe.OlmoeRMSNorm
    ovis2.Ovis2RMSNorm paddleocr_vl.PaddleOCRRMSNorm pe_audio.PeAudioEncoderRMSNorm
    pe_audio_video.PeAudioVideoEncoderRMSNorm pe_video.PeVideoEncoderRMSNorm phi3.Phi3RMSNorm
    phi4_multimodal.Phi4MultimodalRMSNorm pixtral.PixtralRMSNorm qianfan_ocr.QianfanOCRVisionRMSNorm
    qwen2.Qwen2RMSNorm qwen2_5_omni.Qwen2_5OmniRMSNorm qwen2_5_vl.Qwen2_5_VLRMSNorm qwen2_moe.Qwen2MoeRMSNorm
    qwen2_vl.Qwen2VLRMSNorm qwen3.Qwen3RMSNorm qwen3_moe.Qwen3MoeRMSNorm
    qwen3_omni_moe.Qwen3OmniMoeCode2WavRMSNorm qwen3_omni_moe.Qwen3OmniMoeRMSNorm
    qwen3_omni_moe.Qwen3OmniMoeTextRMSNorm qwen3_omni_moe.Qwen3OmniMoeThinkerTextRMSNorm
    qwen3_vl.Qwen3VLTextRMSNorm qwen3_vl_moe.Qwen3VLMoeTextRMSNorm sapiens2.Sapiens2RMSNorm
    seed_oss.SeedOssRMSNorm smollm3.SmolLM3RMSNorm solar_open.SolarOpenRMSNorm timesfm.TimesFmRMSNorm
    timesfm2_5.TimesFm2_5RMSNorm ultrabert.UltrabertRMSNorm ultravbert.UltraVBertRMSNorm
    unlimited_ocr.UnlimitedOcrTextRMSNorm vibevoice.VibeVoiceRMSNorm
    vibevoice_acoustic_tokenizer.VibeVoiceAcousticTokenizerRMSNorm vibevoice_asr.VibeVoiceAsrRMSNorm
    voxtral_realtime.VoxtralRealtimeRMSNorm xcodec2.Xcodec2RMSNorm youtu.YoutuRMSNorm zamba.ZambaRMSNorm
    zamba2.Zamba2RMSNorm zaya.ZayaRMSNorm
    """
)
_SCALED_BEFORE_CAST = _names(
    """
    afmoe.AfmoeRMSNorm beam.BeamRMSNorm deepseek_v4.DeepseekV4RMSNorm flex_olmo.FlexOlmoRMSNorm
    flint.FlintRMSNorm gpt_oss.GptOssRMSNorm helium.HeliumRMSNorm inkling2.Inkling2RMSNorm
    kyutai_speech_to_text.KyutaiSpeechToTextRMSNorm moshi.MoshiRMSNorm nemotron_h.NemotronHRMSNorm
    nemotron_h_omni.NemotronH_Omni_RMSNorm olmo2.Olmo2RMSNorm olmo3.Olmo3RMSNorm olmo_hybrid.OlmoHybridRMSNorm
    openai_privacy_filter.OpenAIPrivacyFilterRMSNorm
    """
)
_CAST_TO_WEIGHT = _names(
    """
    idefics.IdeficsRMSNorm kosmos2_5.Kosmos2_5LayerNorm longt5.LongT5LayerNorm mt5.MT5LayerNorm
    pix2struct.Pix2StructLayerNorm pop2piano.Pop2PianoLayerNorm switch_transformers.SwitchTransformersLayerNorm
    t5.T5LayerNorm udop.UdopLayerNorm umt5.UMT5LayerNorm
    """
)
_CENTERED_WEIGHT = _names(
    """
    gemma.GemmaRMSNorm gemma2.Gemma2RMSNorm gemma3.Gemma3RMSNorm minimax_m3_vl.MiniMaxM3VLRMSNorm
    muse_glimmer.MuseGlimmerTextCenteredRMSNorm qwen3_5.Qwen3_5RMSNorm qwen3_5_moe.Qwen3_5MoeRMSNorm
    qwen3_next.Qwen3NextRMSNorm recurrent_gemma.RecurrentGemmaRMSNorm step3p7.Step3p7RMSNorm
    t5gemma.T5GemmaRMSNorm t5gemma2.T5Gemma2RMSNorm vaultgemma.VaultGemmaRMSNorm
    """
)
_FROZEN = _names(
    """
    conditional_detr.ConditionalDetrFrozenBatchNorm2d d_fine.DFineFrozenBatchNorm2d
    dab_detr.DabDetrFrozenBatchNorm2d deformable_detr.DeformableDetrFrozenBatchNorm2d
    deimv2.Deimv2FrozenBatchNorm2d detr.DetrFrozenBatchNorm2d grounding_dino.GroundingDinoFrozenBatchNorm2d
    mm_grounding_dino.MMGroundingDinoFrozenBatchNorm2d pp_doclayout_v2.PPDocLayoutV2FrozenBatchNorm2d
    pp_doclayout_v3.PPDocLayoutV3FrozenBatchNorm2d pp_doclayout_v4.PPDocLayoutV4FrozenBatchNorm2d
    rt_detr.RTDetrFrozenBatchNorm2d rt_detr_v2.RTDetrV2FrozenBatchNorm2d
    table_transformer.TableTransformerFrozenBatchNorm2d
    """
)
_EITHER_FORMAT = _names(
    """
    convnext.ConvNextLayerNorm convnextv2.ConvNextV2LayerNorm deepseek_ocr2.DeepseekOcr2SamLayerNorm
    deepseek_vl_hybrid.DeepseekVLHybridLayerNorm dinov3_convnext.DINOv3ConvNextLayerNorm
    edgetam.EdgeTamLayerNorm edgetam_video.EdgeTamVideoLayerNorm got_ocr2.GotOcr2LayerNorm
    lw_detr.LwDetrLayerNorm pp_formulanet.PPFormulaNetLayerNorm rf_detr.RfDetrLayerNorm sam.SamLayerNorm
    sam2.Sam2LayerNorm sam2_video.Sam2VideoLayerNorm sam3_tracker.Sam3TrackerLayerNorm
    sam3_tracker_video.Sam3TrackerVideoLayerNorm sam_hq.SamHQLayerNorm seggpt.SegGptLayerNorm
    slanext.SLANeXtLayerNorm unlimited_ocr.UnlimitedOcrSamLayerNorm
    """
)
_CHANNELS_FIRST = _names(
    """
    eomt.EomtLayerNorm2d eomt_dinov3.EomtDinov3LayerNorm2d squeezebert.SqueezeBertLayerNorm
    videomt.VideomtLayerNorm2d
    """
)


@register(*_SCALED_AFTER_CAST, *_CAST_TO_WEIGHT)
class HuggingFaceRms(NormHandler):
    """RMS norm over the last dimension: ``weight * cast(x / rms(x))``."""

    family = "rms"
    output: Literal["input", "promoted"] = "promoted"

    def describe(self, module: nn.Module) -> NormSpec:
        """Width from the weight; eps is called ``variance_epsilon`` or ``eps``."""
        eps = getattr(module, "variance_epsilon", None)
        how = Standardization(
            layout="token",
            center=False,
            scale_by="rms",
            eps=float(module.eps if eps is None else eps),  # type: ignore[arg-type]
            output=self.output,
        )
        return NormSpec(tuple(module.weight.shape), 1, how, bias=False)  # type: ignore[arg-type]


@register(*_SCALED_BEFORE_CAST)
class HuggingFaceRmsCastLast(HuggingFaceRms):
    """RMS norm over the last dimension: ``cast(weight * x / rms(x))``."""

    output: Literal["input", "promoted"] = "input"


@register(*_CENTERED_WEIGHT)
class HuggingFaceRmsCentered(HuggingFaceRmsCastLast):
    """RMS norm over the last dimension with its scale written from 1: ``cast((1 + weight) * x / rms(x))``."""

    def affine(self, module: nn.Module, num_groups: int) -> tuple[Tensor | None, Tensor | None]:
        """The scale is one more than the weight."""
        return 1.0 + module.weight.detach(), None  # type: ignore[operator]


@register(*_FROZEN)
class HuggingFaceFrozenBatch(Batch):
    """Batch Norm with fixed statistics, as detectors use; eps is written into its forward."""

    eps = 1e-5


@register(*_EITHER_FORMAT)
class HuggingFaceLayer(Layer):
    """``nn.LayerNorm`` that is told where the channels are: last, or in dimension 1 of an image."""

    def describe(self, module: nn.Module) -> NormSpec:
        """As the module's ``data_format`` says."""
        first = module.data_format == "channels_first"
        return self.over(module, "position" if first else "token")


register(*_CHANNELS_FIRST)(Layer2d)
