"""Networks to stream: a diffusion transformer shaped as HunyuanVideo's, and small models of libraries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Double and single blocks, width, heads; tokens of text beside those of the video."""

    double: int = 10
    single: int = 20
    width: int = 3072
    heads: int = 24
    text: int = 256


#: 12.5 GB in bfloat16, and what --fake runs.
FULL, TOY = Shape(), Shape(2, 4, 64, 4, 8)


class Attended(nn.Module):
    """Queries, keys and values of one stream, normed by head; and the way out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v of [1, N, width] as [1, heads, N, width / heads]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v


class Stream(nn.Module):
    """One side of a double block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attended = Attended(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Double(nn.Module):
    """Video and text attend to all, each with weights of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.video, self.text = Stream(width, heads), Stream(width, heads)

    def forward(self, video: Tensor, text: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Take and return [1, N, width] of video, [1, T, width] of text; the vector is [1, width]."""
        sides = [(self.video, video), (self.text, text)]
        shifts = [side.modulation(functional.silu(vector)).unsqueeze(1).chunk(6, -1) for side, _ in sides]
        parts = [
            side.attended.split(_normed(x) * (1 + m[1]) + m[0])
            for (side, x), m in zip(sides, shifts, strict=True)
        ]
        q, k, v = (torch.cat(pair, 2) for pair in zip(*parts, strict=True))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        found = []
        for (side, x), m, a in zip(
            sides, shifts, mixed.split([video.shape[1], text.shape[1]], 1), strict=True
        ):
            y = x + m[2] * side.attended.out(a)
            z = functional.gelu(side.up(_normed(y) * (1 + m[4]) + m[3]), approximate="tanh")
            found.append(y + m[5] * side.down(z))
        return found[0], found[1]


class Single(nn.Module):
    """Video and text as one sequence; attention and MLP side by side."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.modulation = nn.Linear(width, 3 * width)
        self.linear1 = nn.Linear(width, 7 * width)
        self.linear2 = nn.Linear(5 * width, width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """Take and return [1, N, width]."""
        shift, scale, gate = self.modulation(functional.silu(vector)).unsqueeze(1).chunk(3, -1)
        qkv, up = self.linear1(_normed(x) * (1 + scale) + shift).split([3 * self.width, 4 * self.width], -1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        mixed = mixed.transpose(1, 2).flatten(2)
        out = self.linear2(torch.cat((mixed, functional.gelu(up, approximate="tanh")), -1))
        return x + gate * out


class Dit(nn.Module):
    """Double blocks, then single ones, over video and text tokens of one width."""

    def __init__(self, shape: Shape = FULL) -> None:
        super().__init__()
        self.doubles = nn.ModuleList(Double(shape.width, shape.heads) for _ in range(shape.double))
        self.singles = nn.ModuleList(Single(shape.width, shape.heads) for _ in range(shape.single))

    def forward(self, video: Tensor, text: Tensor, vector: Tensor) -> Tensor:
        """Take [1, N, width], [1, T, width], [1, width]; return [1, N, width]."""
        for block in self.doubles:
            video, text = block(video, text, vector)
        x = torch.cat((video, text), 1)
        for block in self.singles:
            x = block(x, vector)
        return x[:, : video.shape[1]]


def _normed(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:])


def inputs(shape: Shape, tokens: int, where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same inputs in every process."""
    made = torch.Generator().manual_seed(tokens)
    sizes = ((1, tokens, shape.width), (1, shape.text, shape.width), (1, shape.width))
    return tuple(torch.randn(s, generator=made).bfloat16().to(where) for s in sizes)  # type: ignore[return-value]


def write_dit(folder: Path, shape: Shape, where: torch.device) -> int:
    """Write random weights, a file a block, as one sharded checkpoint; return their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        module = Dit(shape)
    made = torch.Generator(where).manual_seed(0)
    index: dict[str, str] = {}
    nbytes = 0
    for kind in ("doubles", "singles"):
        for i, block in enumerate(getattr(module, kind)):
            tensors = {}
            for name, p in block.named_parameters():
                std = 1.0 if p.dim() == 1 and "norm" in name else 0.02
                value = torch.randn(p.shape, generator=made, device=where, dtype=torch.bfloat16) * std
                tensors[f"{kind}.{i}.{name}"] = value.cpu()
            file = f"{kind}-{i:02}.safetensors"
            save_file(tensors, folder / file)
            index |= dict.fromkeys(tensors, file)
            nbytes += sum(t.nbytes for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": nbytes}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return nbytes


def load_dit(folder: Path, shape: Shape, where: torch.device) -> Dit:
    """Return the module with its weights on a device."""
    from safetensors import safe_open

    with torch.device("meta"):
        module = Dit(shape)
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt", device=str(where)) as opened:
            state |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)
