"""The seven dimensions: what each needs, how it is brought to 0..1, and the Quality Score of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Dimension:
    """One dimension: VBench's name, a short one, the least and the most its score can be, its weight.

    `files` are what its networks read, below VBench's cache folder.
    """

    name: str
    short: str
    least: float
    most: float
    weight: float = 1.0
    files: tuple[str, ...] = ()

    def normalised(self, score: float) -> float:
        """Return a score in 0..1."""
        return (score - self.least) / (self.most - self.least)


#: In the order of VBench's tables (vbench 0.1.5).
DIMENSIONS = (
    Dimension(
        "subject_consistency",
        "subject",
        0.1462,
        1.0,
        files=("dino_model/facebookresearch_dino_main/", "dino_model/dino_vitbase16_pretrain.pth"),
    ),
    Dimension("background_consistency", "background", 0.2615, 1.0, files=("clip_model/ViT-B-32.pt",)),
    Dimension("temporal_flickering", "flicker", 0.6293, 1.0),
    Dimension("motion_smoothness", "smoothness", 0.706, 0.9975, files=("amt_model/amt-s.pth",)),
    Dimension("dynamic_degree", "dynamic", 0.0, 1.0, 0.5, files=("raft_model/models/raft-things.pth",)),
    Dimension(
        "aesthetic_quality",
        "aesthetic",
        0.0,
        1.0,
        files=("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    ),
    Dimension("imaging_quality", "imaging", 0.0, 1.0, files=("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",)),
)
BY_NAME = {d.name: d for d in DIMENSIONS}

#: What VBench divides by: the sum of the weights.
DIVISOR = sum(d.weight for d in DIMENSIONS)


def weighted(scores: Mapping[str, float]) -> dict[str, float]:
    """Return each score normalised and weighted, by name."""
    return {d.name: d.normalised(scores[d.name]) * d.weight for d in DIMENSIONS if d.name in scores}


def quality(scores: Mapping[str, float]) -> float | None:
    """Return VBench's Quality Score as published, None unless all seven scores are there."""
    parts = weighted(scores)
    return sum(parts.values()) / DIVISOR if len(parts) == len(DIMENSIONS) else None


def quality_as_in_table(scores: Mapping[str, float]) -> float | None:
    """Return the score by which the last column of the paper's Table 6 is reproduced. It is not VBench's.

    There dynamic degree counts whole in the sum, and the divisor is that of its being halved.
    """
    official = quality(scores)
    if official is None:
        return None
    extra = sum((1 - d.weight) * d.normalised(scores[d.name]) for d in DIMENSIONS)
    return official + extra / DIVISOR
