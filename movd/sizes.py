"""The sizes and frame counts that Open-Sora v1.2 takes; sizes are height x width in pixels, ratios H:W."""

from __future__ import annotations

import difflib

from blockstream.errors import ConfigError

#: Height to width, in the order of the columns of `_SIZES`.
ASPECT_RATIOS = (
    *("3:8", "9:21", "12:25", "1:2", "9:17", "27:50", "9:16", "5:8", "2:3", "3:4"),
    *("1:1", "4:3", "3:2", "16:9", "17:9", "2:1", "50:27"),
)

#: One row a resolution, HEIGHTxWIDTH for each aspect ratio: the buckets of the released model.
_SIZES = {
    "144p": "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 192x192"
    " 221x165 235x156 256x144 263x139 271x135 277x132",
    "240p": "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 320x320"
    " 370x278 392x262 426x240 440x232 452x226 462x222",
    "360p": "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 480x480"
    " 554x416 588x392 640x360 660x350 678x340 692x332",
    "480p": "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 640x640"
    " 740x555 784x522 854x480 880x466 906x454 924x444",
    "720p": "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 832x1110"
    " 960x960 1108x832 1176x784 1280x720 1320x698 1358x680 1386x666",
}
RESOLUTIONS = tuple(_SIZES)


def size_of(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """Return (height, width) in pixels. Raises ConfigError naming the nearest known word."""
    row = _pick("resolution", resolution, RESOLUTIONS)
    column = _pick("aspect_ratio", aspect_ratio, ASPECT_RATIOS)
    height, width = _SIZES[RESOLUTIONS[row]].split()[column].split("x")
    return int(height), int(width)


def check_frames(frames: int) -> None:
    """Raise ConfigError for a number of frames that the time transform cannot serve."""
    if 2 <= frames <= 16:
        raise ConfigError(
            f"frames = {frames}: the time transform scales by sqrt(frames // 17 * 5), which is 0 from 2 to "
            "16 frames (Open-Sora returns NaN there); the nearest counts that work are 1 and 17"
        )
    if frames < 1:
        raise ConfigError(f"frames = {frames}: at least 1 is needed")


def _pick(key: str, value: str, known: tuple[str, ...]) -> int:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{key} {value!r} is none of Open-Sora's; {hint}known: {', '.join(known)}")
    return known.index(value)
