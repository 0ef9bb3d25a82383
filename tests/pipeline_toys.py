"""Pipelines of `diffusers` with tiny random weights: each kind that `from_pipeline` knows."""

import json
import logging
import tempfile
from functools import cache
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

diffusers.utils.logging.disable_progress_bar()
logging.getLogger("diffusers").setLevel(logging.ERROR)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WIDTH = 16
"""Of text embeddings."""
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@cache
def clip_tokenizer():
    folder = Path(tempfile.mkdtemp())
    words = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


@cache
def word_tokenizer():
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "castle": 4}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def clip(kind=CLIPTextModel):
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=WIDTH,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return kind(config).eval()


def t5():
    torch.manual_seed(2)
    return T5EncoderModel(
        T5Config(vocab_size=8, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()


def vae(channels=4, **config):
    torch.manual_seed(3)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        **config,
    ).eval()


def unet(channels=4, **config):
    torch.manual_seed(4)
    sizes = {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return diffusers.UNet2DConditionModel(**{**sizes, **config}).eval()


def ddim(**config):
    # To no noise at all in the last step, as chains of this toolkit go.
    return diffusers.DDIMScheduler(
        **{**SCALED_LINEAR, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1, **config}
    )


def euler(**config):
    return diffusers.EulerDiscreteScheduler(**{**SCALED_LINEAR, **config})


def stable_diffusion(scheduler=None, safety_checker=None, network=None):
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=network or unet(),
        scheduler=scheduler or ddim(),
        safety_checker=safety_checker,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(scheduler=None):
    network = unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
        transformer_layers_per_block=1,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=network,
        scheduler=scheduler or euler(),
    )


def stable_diffusion_3(**config):
    torch.manual_seed(5)
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    ).eval()
    return diffusers.StableDiffusion3Pipeline(
        transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config}),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux(guidance=False):
    torch.manual_seed(6)
    network = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    ).eval()
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=word_tokenizer(),
        transformer=network,
    )
    pipe.default_sample_size = 8
    return pipe


def dit(scheduler=None):
    torch.manual_seed(7)
    network = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
    ).eval()
    torch.nn.init.normal_(network.proj_out_2.weight, std=0.3)
    labels = {207: "golden retriever, retriever", 13: "junco"}
    return diffusers.DiTPipeline(
        transformer=network, vae=vae(), scheduler=scheduler or ddim(), id2label=labels
    )


def pixels(scheduler=None, classes=None):
    torch.manual_seed(8)
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        num_class_embeds=classes,
    ).eval()
    return diffusers.DDPMPipeline(
        unet=network, scheduler=scheduler or diffusers.DDIMScheduler(clip_sample=False)
    )
