"""Cosines and norms of task vectors, from the models' own files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evaluate.similarity import similarity


def saved(path: Path, **change: float) -> Path:
    path.mkdir()
    tensors = {
        "conv_stem.weight": torch.full((4,), 2.0),
        "blocks.0.0.weight": torch.full((4,), 1.0),
        "blocks.1.0.weight": torch.full((9,), 1.0),
        "bn1.running_mean": torch.zeros(3),
        "head.weight": torch.full((4,), 1.0),
    }
    names = {"stem": "conv_stem.weight", "first": "blocks.0.0.weight", "head": "head.weight"}
    for part, value in change.items():
        tensors[names[part]] = tensors[names[part]] + value
    save_file(tensors, path / "model.safetensors")
    return path


def test_parts_run_from_the_stem_to_the_head_and_norms_are_relative(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    models = {"a": saved(tmp_path / "a", stem=1.0), "b": saved(tmp_path / "b", head=-3.0)}
    found = similarity(base, models)
    assert found is not None
    assert found.groups == ("stem", "block 0.0", "block 1.0", "head")
    assert found.norms == ((0.5, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 3.0))


def test_cosines_are_those_of_the_whole_vectors(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    models = {
        "a": saved(tmp_path / "a", stem=1.0),
        "b": saved(tmp_path / "b", stem=1.0, first=1.0),
        "c": saved(tmp_path / "c", stem=-2.0),
        "none": saved(tmp_path / "none"),
    }
    found = similarity(base, models)
    assert found is not None
    assert found.cosine[0][:3] == pytest.approx((1.0, 0.5**0.5, -1.0))
    assert found.cosine[3] == (None,) * 4


def test_models_of_another_architecture_are_left_out(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    (tmp_path / "other").mkdir()
    save_file({"fc.weight": torch.ones(2)}, tmp_path / "other" / "model.safetensors")
    models = {"a": saved(tmp_path / "a", stem=1.0), "other": tmp_path / "other"}
    assert similarity(base, models) is None
    found = similarity(base, {**models, "b": saved(tmp_path / "b", head=1.0)})
    assert found is not None
    assert found.models == ("a", "b")


def test_a_new_head_of_zeros_has_no_relative_norm_but_counts_in_the_cosine(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", head=-1.0)
    models = {"a": saved(tmp_path / "a"), "b": saved(tmp_path / "b", head=1.0)}
    found = similarity(base, models)
    assert found is not None
    assert found.groups == ("stem", "block 0.0", "block 1.0")
    assert found.cosine[0][1] == pytest.approx(1.0)


def test_a_base_of_zeros_everywhere_has_cosines_and_no_norms(tmp_path: Path) -> None:
    for name, value in {"base": 0.0, "a": 1.0, "b": -1.0}.items():
        (tmp_path / name).mkdir()
        save_file({"fc.weight": torch.full((2,), value)}, tmp_path / name / "model.safetensors")
    found = similarity(tmp_path / "base", {name: tmp_path / name for name in "ab"})
    assert found is not None
    assert found.cosine[0] == pytest.approx((1.0, -1.0))
    assert (found.groups, found.norms) == ((), ((), ()))
