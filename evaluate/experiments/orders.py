"""In which order sites come and go."""

from __future__ import annotations

from collections.abc import Sequence


def arrival_orders(sites: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Orders of arrival: as the sites are sorted, turned by one each time."""
    return [(*sites[turn:], *sites[:turn]) for turn in range(min(count, len(sites)))]


def stages(order: Sequence[str]) -> list[tuple[str, ...]]:
    """Who is there after each arrival, and then after each withdrawal but the last."""
    arriving = [tuple(order[:size]) for size in range(1, len(order) + 1)]
    leaving = [tuple(order[size:]) for size in range(1, len(order))]
    return [*arriving, *leaving]
