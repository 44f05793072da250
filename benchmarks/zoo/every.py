"""Every text architecture of transformers that `models` does not name, as small as its config goes."""

from __future__ import annotations

import torch

from .models import TRANSFORMERS, Animal, text

#: A config whose sizes have other names than these is built in full: those are left out.
MOST_PARAMETERS = 4_000_000


def every() -> dict[str, Animal]:
    """Return the architectures by name; which of them a small config fits is found out as they are built."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    found = {}
    for names, decoder in (
        (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, False),
        (MODEL_FOR_MASKED_LM_MAPPING_NAMES, False),
        (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, True),
    ):
        for name in names.values():
            if isinstance(name, str) and name not in TRANSFORMERS:
                found.setdefault(name, text(name, decoder))
    return found


def why_not(animal: Animal) -> str | None:
    """Return why an architecture is not compared; None where it is."""
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in animal.make().parameters())
    except Exception as error:
        return (
            f"not compared: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        )
    return f"not compared: {count:,} parameters" if count > MOST_PARAMETERS else None
