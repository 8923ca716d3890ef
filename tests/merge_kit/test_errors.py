"""The tree of errors."""

from __future__ import annotations

import inspect

import pytest

from merge_kit import errors


def classes():
    return [c for _, c in inspect.getmembers(errors, inspect.isclass)]


def test_the_drawn_tree_is_the_real_one():
    """Each line's depth in the drawing is the class's distance from the root."""
    assert errors.__doc__
    drawn = {}
    for line in errors.__doc__.splitlines():
        words = line.lstrip("│├└─ ").split()
        if words and words[0].endswith("Error"):
            drawn[words[0]] = (len(line) - len(line.lstrip("│├└─ "))) // 4
    real = {c.__name__: c.__mro__.index(errors.MergeKitError) for c in classes()}
    assert drawn == real


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_only_wrong_use_exits_with_2(kind):
    assert kind.exit_code == (2 if kind is errors.UsageError else 1)


def test_a_missing_extra_is_named_with_its_command():
    error = errors.MissingExtraError("dicom", "reading scan.dcm")
    assert str(error) == (
        "reading scan.dcm needs the extra 'dicom', which is not installed: "
        "run pip install 'merge-kit[dicom]'."
    )
