"""The table of merge methods, by name."""

from __future__ import annotations

from merge_kit.methods import geometry, interference, linear, robust, sparsify, spectral
from merge_kit.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method
    for family in (linear, interference, sparsify, geometry, spectral, robust)
    for method in family.METHODS
}
