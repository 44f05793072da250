"""HunyuanVideo: text through LLaMA and CLIP, a distilled full-attention DiT, a causal 3-D VAE.

In: folders as they are published (diffusers' layout or Tencent's). Out: networks, a flow, frames.
"""
