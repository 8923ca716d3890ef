"""Merge methods: pure functions of tensors, one family a file, and the table that lists them."""

from merge_kit.methods.base import Block, Method, Vectors, WeightScheme
from merge_kit.methods.registry import METHODS

__all__ = ["METHODS", "Block", "Method", "Vectors", "WeightScheme"]
