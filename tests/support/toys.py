"""Modules that do what real ones do to surprise a streamer, each as small as it can be."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

D = 16


class Block(nn.Module):
    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.up = nn.Linear(d, 2 * d)
        self.down = nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks one after another, something before and after them."""

    def __init__(self, n: int = 4, d: int = D) -> None:
        super().__init__()
        self.first = nn.Linear(d, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(n))
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Zipped(nn.Module):
    """Registers all spatial blocks, then all temporal ones, and runs them in turn."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.spatial = nn.ModuleList(Block() for _ in range(n))
        self.temporal = nn.ModuleList(Block() for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        for s, t in zip(self.spatial, self.temporal, strict=True):
            x = t(s(x))
        return x


ZIPPED = [f"{kind}.{i}" for i in range(3) for kind in ("spatial", "temporal")]


class Declared(Zipped):
    """Names its own order."""

    def stream_order(self) -> list[str]:
        return ZIPPED


class Backwards(Stack):
    """Runs its blocks from last to first."""

    def forward(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return self.norm(self.first(x))


class Twice(Stack):
    """Calls its second block twice in a pass, and its first again at the end."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, *rest = self.blocks
        x = b(b(a(x)))
        for block in rest:
            x = block(x)
        return a(x)


class Skips(Stack):
    """Skips blocks by what the data say."""

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i % 2 or x.mean() > 0:
                x = block(x)
        return self.norm(x)


class Tied(nn.Module):
    """Two blocks share a matrix; the head is the embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, D)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.head = nn.Linear(D, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Mixed(Block):
    """A block with a module that all blocks share."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.shared(x))


class SharedInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(D, D)
        self.blocks = nn.ModuleList(Mixed(shared) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Peeks(nn.Module):
    """Uses its parameters without calling the modules that own them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(D))
        self.proj = nn.Linear(D, D)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x * self.scale, self.proj.weight)
        for block in self.blocks:
            x = block(x.to(block.up.weight.dtype))
        return x


class Steals(Stack):
    """Uses the weights of a block that is not running."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.blocks[1].up.weight.T


class Attention(nn.Module):
    """nn.MultiheadAttention takes its output projection's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 2 * D, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Strided(nn.Module):
    """Products of inputs that lie in strides: torch folds them by whether the weight requires grad."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D, bias=k % 2 > 0) for k in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x.transpose(0, 1)))
        return x


class Recurrent(nn.Module):
    """Recurrent layers keep lists of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(D, D, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return x


class Codec(nn.Module):
    """Is used by methods of its own; its forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*(Block() for _ in range(3)))
        self.middle = nn.Linear(D, D)
        self.decoder = nn.Sequential(*(Block() for _ in range(3)))

    def encode(self, x: Tensor) -> Tensor:
        return self.middle(self.encoder(x))

    def decode(self, x: Tensor) -> Tensor:
        return self.decoder(self.middle(x))


class Towers(nn.Module):
    """Encoder and decoder, each a stack of its own length."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stack(3)
        self.decoder = Stack(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Rotary(nn.Module):
    """Buffers: one stored, one computed and never stored, one behind a cache keyed by shape."""

    def __init__(self, config: object = None) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.register_buffer("frequencies", 1.0 / torch.arange(1, D + 1), persistent=False)
        self.register_buffer("shift", torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.frequencies + self.shift
        for block in self.blocks:
            x = block(x)
        return x


class Outside(nn.Module):
    """Large parts outside its two small blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(D, 8 * D)
        self.narrow = nn.Linear(8 * D, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(D, 12 * D)
        self.bias = nn.Parameter(torch.randn(12 * D))

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(self.wide(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.bias


class Plain(nn.Module):
    """No block repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(D, 4 * D)
        self.b = nn.Conv1d(1, 3, 3, padding=1)
        self.c = nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).unsqueeze(1)).mean(1))


def noise(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5, D)), generator=torch.Generator().manual_seed(3))
