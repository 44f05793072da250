"""A small Stable Diffusion of random weights, as a folder of diffusers."""

from __future__ import annotations

from pathlib import Path

import torch


def save_stable_diffusion(path: Path, reads_prompts: bool = False) -> Path:
    """Save one; without a tokenizer, where it does not read prompts: they come as embeddings."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
        )
    )
    tokenizer = None
    if reads_prompts:
        letters = [f"{c}{end}" for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
        vocab = {token: n for n, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
        tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    diffusers.StableDiffusionPipeline(
        vae, text, tokenizer, unet, diffusers.DDIMScheduler(), None, None, requires_safety_checker=False
    ).save_pretrained(path)
    return path
