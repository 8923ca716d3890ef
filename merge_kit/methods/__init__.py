"""Merge methods: pure functions of tensors, one family a file, and the table that lists them."""

from merge_kit.methods.registry import METHODS, Method, Vectors, WeightScheme

__all__ = ["METHODS", "Method", "Vectors", "WeightScheme"]
