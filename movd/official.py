"""Official configurations and state dicts: read by their own names, refused by name when foreign."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor, nn

from blockstream.errors import CheckpointError, ConfigError

#: Keys transformers, mmengine and diffusers write into every config.json; they say nothing of the network.
BOOKKEEPING = frozenset(
    [
        "architectures",
        "auto_map",
        "from_pretrained",
        "force_huggingface",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "type",
        "_class_name",
        "_diffusers_version",
        "_name_or_path",
    ]
)


class OfficialConfig(BaseModel):
    """A frozen configuration under the official names.

    `ignored` are official keys that change no number here and are dropped; `fixed` are official
    switches of which one value is built. Anything else unknown is refused by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ignored: ClassVar[frozenset[str]] = frozenset()
    fixed: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, **official: Any) -> None:
        try:
            super().__init__(**official)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or type(self).__name__
            raise ConfigError(
                f"{type(self).__name__}: {where} = {first['input']!r}: {first['msg']}"
            ) from None

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        kept = {}
        for key, value in values.items():
            if key in cls.model_fields:
                kept[key] = value
            elif key in cls.fixed:
                if value != cls.fixed[key]:
                    raise ConfigError(
                        f"{cls.__name__}: {key} = {value!r} is not supported, only {cls.fixed[key]!r}"
                    )
            elif key not in cls.ignored and key not in BOOKKEEPING:
                cls.refuse(key)
        return kept

    @classmethod
    def refuse(cls, key: str) -> None:
        """Raise the error for a key that is not part of this architecture."""
        near = difflib.get_close_matches(key, cls.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {sorted(cls.model_fields)}"
        raise ConfigError(f"{cls.__name__}: unknown key {key!r}; {hint}")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, by key."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def tied_keys(model: nn.Module) -> list[set[str]]:
    """Return the groups of keys under which a model lists one and the same tensor."""
    groups: dict[int, set[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), set()).add(key)
    return [keys for keys in groups.values() if len(keys) > 1]


def check_keys(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], *, what: str = "checkpoint") -> None:
    """Check that a checkpoint holds exactly the model's keys, each in the model's shape.

    `shapes` may come from file headers alone: nothing is loaded. Of keys that are one tensor, one is enough.
    Raises CheckpointError with the first few keys that differ and the variant they point to.
    """
    own = shapes_of(model.state_dict())
    spare = {key for keys in tied_keys(model) if keys & shapes.keys() for key in keys}
    missing = sorted(own.keys() - shapes.keys() - spare)
    unexpected = sorted(shapes.keys() - own.keys())
    wrong = [
        f"{key} is {tuple(shapes[key])}, not {own[key]}"
        for key in sorted(own.keys() & shapes.keys())
        if own[key] != tuple(shapes[key])
    ]
    if not (missing or unexpected or wrong):
        return
    found = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    parts = [_few(keys, word) for word, keys in found.items() if keys]
    variant = likely_variant(shapes)
    hint = f"; it looks like {variant}" if variant else ""
    raise CheckpointError(f"{what} does not fit {type(model).__name__}: {', '.join(parts)}{hint}")


def load_official(model: nn.Module, state_dict: Mapping[str, Tensor], *, what: str = "checkpoint") -> None:
    """Load a state dict strictly; on any difference the model is left as it was.

    A model on the meta device takes the tensors themselves, any other one copies them.
    """
    check_keys(model, shapes_of(state_dict), what=what)
    tensors = dict(state_dict)
    for keys in tied_keys(model):
        tensor = next(tensors[key] for key in sorted(keys) if key in tensors)
        tensors.update(dict.fromkeys(keys, tensor))
    meta = any(tensor.is_meta for tensor in model.state_dict().values())
    model.load_state_dict(tensors, strict=True, assign=meta)
    if meta and hasattr(model, "tie_weights"):
        model.tie_weights()


def likely_variant(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the network a checkpoint's keys belong to, None when they are of no known one."""
    heads = {key.split(".", 1)[0] for key in shapes}
    if {"spatial_blocks", "temporal_blocks"} <= heads:
        width = shapes.get("final_layer.scale_shift_table", (0, 0))[-1]
        depth = len({key.split(".")[1] for key in shapes if key.startswith("spatial_blocks.")})
        return f"an STDiT3 of depth {depth} and hidden_size {width}"
    if "blocks" in heads and any("attn_temp" in key for key in shapes):
        return "an Open-Sora 1.0/1.1 checkpoint (STDiT or STDiT2, joint blocks); use OpenSora-STDiT-v3"
    if "double_blocks" in heads or "img_in" in heads:
        return "a Flux-like checkpoint (Open-Sora 2.0 or HunyuanVideo)"
    if {"spatial_vae", "temporal_vae"} <= heads:
        return "an OpenSora-VAE-v1.2 checkpoint"
    if {"encoder", "decoder", "quant_conv"} <= heads and any(".down_blocks." in k for k in shapes):
        return "a plain 2-D AutoencoderKL (the spatial half of the VAE alone)"
    if any(key.startswith("encoder.block.0.layer.0.SelfAttention") for key in shapes):
        if any(key.startswith("decoder.") for key in shapes):
            return "a full T5 with its decoder"
        return "a T5 encoder"
    return None


def _few(keys: list[str], word: str, n: int = 3) -> str:
    more = f" and {len(keys) - n} more" if len(keys) > n else ""
    return f"{len(keys)} {word} ({', '.join(keys[:n])}{more})"
