"""The table of merge methods, by name."""

from __future__ import annotations

from merge_kit.methods import (
    competition,
    data_free,
    geometry,
    interference,
    linear,
    masks,
    regression,
    robust,
    sparsify,
)
from merge_kit.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method
    for family in (
        linear,
        interference,
        competition,
        masks,
        sparsify,
        geometry,
        robust,
        regression,
        data_free,
    )
    for method in family.METHODS
}
