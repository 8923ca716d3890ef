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
    spectral,
)
from merge_kit.methods.base import Method

_FAMILIES = (
    *(linear, interference, competition, masks, sparsify, geometry),
    *(spectral, robust, regression, data_free),
)
METHODS: dict[str, Method] = {
    method.name: method for family in _FAMILIES for method in family.METHODS
}
