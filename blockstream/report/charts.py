"""Small drawings of the page, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blockstream.report.sampling import Steps

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 540, 230, 56, 14, 12, 32
#: Samplings drawn; more look alike.
LINES = 12


def straightness_svg(samplings: Sequence[Steps]) -> str:
    """Return the cosine between consecutive velocities by step; "" when none was recorded."""
    shown = [s for s in samplings[:LINES] if any(c is not None for c in s.cosine)]
    values = [c for s in shown for c in s.cosine if c is not None]
    if not values:
        return ""
    low = min(0.98, *values) if len(values) > 1 else min(0.98, values[0])
    low -= 0.04 * (1 - low)
    last = max(max(s.of for s in shown) - 1, 1)

    def x(i: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * i / last

    def y(c: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (c - low) / (1 - low))

    parts = [_axis(x, y, low, last)]
    for steps in shown:
        points = [(x(i), y(c)) for i, c in zip(steps.indices, steps.cosine, strict=True) if c is not None]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="var(--kept)" stroke-width="2" opacity="0.8"/>'
        )
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.4" fill="var(--kept)"/>' for px, py in points]
        at = dict(zip(steps.indices, steps.cosine, strict=True))
        for i, _ in steps.leaps:
            if (c := at.get(i)) is not None:
                parts.append(
                    f'<circle cx="{x(i):.1f}" cy="{y(c):.1f}" r="6" fill="none" stroke="var(--load)" '
                    'stroke-width="2"/>'
                )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="cosine by step" '
        f'font-family="system-ui, sans-serif" font-size="14">{"".join(parts)}</svg>'
    )


def _axis(x: Callable[[float], float], y: Callable[[float], float], low: float, last: int) -> str:
    parts = []
    for k in range(5):
        c = low + (1 - low) * k / 4
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(c):.1f}" y2="{y(c):.1f}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 8}" y="{y(c) + 4:.1f}" text-anchor="end" fill="var(--soft)">{c:.3f}</text>'
        )
    every = max(1, round(last / 10))
    for i in range(0, last + 1, every):
        parts.append(
            f'<text x="{x(i):.1f}" y="{HEIGHT - 10}" text-anchor="middle" fill="var(--soft)">{i}</text>'
        )
    return "".join(parts)
