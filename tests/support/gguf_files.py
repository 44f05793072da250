"""GGUF files of small models, written by the gguf package; quantised blocks are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

#: Where the float16 numbers of a block lie.
_HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2),
           "Q5_K": (0, 2), "Q6_K": (208,)}  # fmt: skip


def blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return the bytes of a tensor in a quantised format, of small finite numbers."""
    import gguf

    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (int(np.prod(shape)) // elements, nbytes), dtype=np.uint8)
    for at in _HALVES[kind]:
        small = rng.normal(scale=0.002, size=(len(raw), 1)).astype(np.float16)
        raw[:, at : at + 2] = small.view(np.uint8).reshape(-1, 2)
    return raw.reshape(*shape[:-1], -1)


def write(path: Path, architecture: str, settings: dict, tensors: dict[str, np.ndarray | tuple]) -> Path:
    """Write a file; a tensor is an array of floats, or (format, shape) of drawn blocks."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in settings.items():
        kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        kinds.get(type(value), writer.add_array)(key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            kind, shape = value
            writer.add_tensor(name, blocks(kind, shape, rng), raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(
    path: Path, kinds: tuple[str, ...] = ("Q4_K", "Q6_K", "Q8_0"), layers: int = 3, wide: int = 256
) -> Path:
    """Write a small llama with grouped queries, its matrices in these formats by turns."""
    rng = np.random.default_rng(1)

    def norm() -> np.ndarray:
        return (1 + rng.normal(scale=0.1, size=wide)).astype(np.float32)

    shapes = {
        "attn_q": (wide, wide), "attn_k": (wide // 2, wide), "attn_v": (wide // 2, wide),
        "attn_output": (wide, wide), "ffn_gate": (2 * wide, wide), "ffn_up": (2 * wide, wide),
        "ffn_down": (wide, 2 * wide),
    }  # fmt: skip
    tensors: dict = {"token_embd.weight": (kinds[0], (64, wide)), "output_norm.weight": norm()}
    tensors["output.weight"] = (kinds[-1], (64, wide))
    for i in range(layers):
        for j, (name, shape) in enumerate(shapes.items()):
            tensors[f"blk.{i}.{name}.weight"] = (kinds[(i + j) % len(kinds)], shape)
        tensors[f"blk.{i}.attn_norm.weight"] = norm()
        tensors[f"blk.{i}.ffn_norm.weight"] = norm()
    settings = {
        "general.name": "tiny",
        "llama.block_count": layers,
        "llama.context_length": 64,
        "llama.embedding_length": wide,
        "llama.feed_forward_length": 2 * wide,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": wide // 4,
        "llama.vocab_size": 64,
    }
    return write(path, "llama", settings, tensors)
