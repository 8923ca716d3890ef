"""The table of merge methods, by name."""

from __future__ import annotations

from merge_kit.methods import (
    data_free,
    geometry,
    interference,
    linear,
    regression,
    robust,
    sparsify,
)
from merge_kit.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method
    for family in (linear, interference, sparsify, geometry, robust, regression, data_free)
    for method in family.METHODS
}
