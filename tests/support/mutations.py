"""Damaged headers, and what must hold of them: refused, or every tensor within the file.

    python -m tests.support.mutations [--cases 1000000] [--seed 0]

runs that many cases against both header parsers; the test suite runs a few hundred.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import struct
import time
import zipfile
from functools import cache
from itertools import pairwise
from pathlib import Path

from blockstream.checkpoint.read.entries import FileStamp
from blockstream.checkpoint.read.safetensors_header import length_of_header, parse_header
from blockstream.checkpoint.read.torch_zip import scan
from blockstream.errors import CheckpointError

PATH = Path("damaged")
_NUMBERS = (-1, 0, 1, 4, 7, 8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 1.5, True, None, "8", [], {})


def check_safetensors(content: bytes) -> None:
    """Hold that the parser refuses the content, or describes disjoint bytes of it."""
    with contextlib.suppress(CheckpointError):
        n = length_of_header(PATH, content[:8], len(content))
        stamp = FileStamp(PATH, len(content), 0, 0, 8 + n, "")
        header = parse_header(content[8 : 8 + n], stamp)
        spans = sorted((e.offset, e.end) for e in header.entries.values() if e.nbytes)
        assert all(header.data_start <= a <= b <= len(content) for a, b in spans)
        assert all(b <= a for (_, b), (a, _) in pairwise(spans))


def check_torch_zip(content: bytes) -> None:
    """Hold that the scanner refuses the content, or describes disjoint bytes of it."""
    with contextlib.suppress(CheckpointError):
        records, directory = scan(io.BytesIO(content), len(content), PATH)
        spans = sorted((r.offset, r.offset + r.nbytes) for r in records.values())
        assert all(0 <= a <= b <= directory <= len(content) for a, b in spans)
        assert all(b <= a for (_, b), (a, _) in pairwise(s for s in spans if s[0] < s[1]))


def damaged_safetensors(seed: int) -> bytes:
    """Return a small safetensors file damaged in a way the seed decides."""
    rng = random.Random(seed)
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for i in range(rng.randint(1, 4)):
        n = rng.randint(0, 3)
        place = [begin, begin + 4 * n]
        table[f"t{i}"] = {"dtype": "F32", "shape": [n], "data_offsets": place}
        begin += 4 * n
    for _ in range(rng.randint(0, 2)):
        _damage_value(rng, table)
    text = json.dumps(table).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(begin)
    return _damage_bytes(rng, content)


def damaged_torch_zip(seed: int) -> bytes:
    """Return a small torch zip file damaged in a way the seed decides."""
    rng = random.Random(seed)
    return _damage_bytes(rng, torch_zip(rng.randint(0, 3)), least=1)


@cache
def torch_zip(storages: int) -> bytes:
    """Return an archive as torch writes it, with some storages."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/byteorder", b"little")
        for i in range(storages):
            with archive.open(f"a/data/{i}", "w", force_zip64=bool(i % 2)) as member:
                member.write(bytes(16 * i))
    return stream.getvalue()


def _damage_value(rng: random.Random, table: dict[str, object]) -> None:
    """Replace one value somewhere in the table."""
    row = table[rng.choice(list(table))]
    if not isinstance(row, dict) or not row:
        return
    key = rng.choice(list(row))
    value = row[key]
    if isinstance(value, list) and value and rng.random() < 0.7:
        value[rng.randrange(len(value))] = rng.choice(_NUMBERS)
    else:
        row[key] = rng.choice((*_NUMBERS, "F16", "F64", "BOOL", [2**33, 2**33]))


def _damage_bytes(rng: random.Random, content: bytes, least: int = 0) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    damaged = bytearray(content)
    for _ in range(rng.randint(least, 3)):
        at = rng.randrange(len(damaged)) if damaged else 0
        match rng.randrange(5):
            case 0 if damaged:
                damaged[at] ^= 1 << rng.randrange(8)
            case 1:
                damaged[at : at + rng.randint(1, 8)] = rng.randbytes(rng.randint(1, 8))
            case 2:
                del damaged[at:]
            case 3:
                damaged[at:at] = damaged[at : at + rng.randint(1, 64)]
            case _:
                n = rng.choice((1, 2, 4, 8))
                value = rng.choice((0, 1, 2 ** (8 * n) - 1, 2 ** (8 * n - 1), len(content)))
                damaged[at : at + n] = (value % 2 ** (8 * n)).to_bytes(n, "little")
    return bytes(damaged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1_000_000, help="cases for each parser")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for make, check in (
        (damaged_safetensors, check_safetensors),
        (damaged_torch_zip, check_torch_zip),
    ):
        begin = time.perf_counter()
        for case in range(options.cases):
            seed = options.seed * 2**40 + case
            try:
                check(make(seed))
            except Exception:
                print(f"{check.__name__} fails for seed {seed}")
                raise
        seconds = time.perf_counter() - begin
        print(f"{check.__name__}: {options.cases} cases held, {seconds:.0f} s")


if __name__ == "__main__":
    main()
