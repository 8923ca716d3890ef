"""The table of merge methods, by name."""

from __future__ import annotations

from merge_kit.methods import competition, geometry, interference, linear, masks, robust, sparsify
from merge_kit.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method
    for family in (linear, interference, competition, masks, sparsify, geometry, robust)
    for method in family.METHODS
}
