"""config.json as timm writes it, in its forms."""

from __future__ import annotations

import json

import pytest
import timm
from timm.models._hub import save_config_for_hf

from merge_kit.configuration import read_config
from merge_kit.errors import VectorError
from tests.merge_kit.helpers import says


@pytest.fixture
def read(tmp_path):
    """What is read of a config.json with this content."""

    def run(data):
        text = data if isinstance(data, str) else json.dumps(data)
        (tmp_path / "config.json").write_text(text)
        return read_config(tmp_path)

    return run


def test_what_timm_writes_is_read(tmp_path):
    model = timm.create_model("test_vit", num_classes=2)
    labels = {"label_names": ["b", "a"]}
    save_config_for_hf(model, tmp_path / "config.json", model_config=labels)
    found = read_config(tmp_path)
    assert (found.classifier, found.label_names) == (("head",), ("b", "a"))
    assert json.loads(found.text) == json.loads((tmp_path / "config.json").read_text())


def test_the_file_beside_the_weights_counts(read, tmp_path):
    read({"classifier": "fc"})
    assert read_config(tmp_path / "model.safetensors").classifier == ("fc",)
    assert read_config(tmp_path / "other.safetensors") is None
    assert read_config(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("data", "classifier", "labels"),
    [
        ({"classifier": "fc", "labels": ["x"]}, ("fc",), ("x",)),
        ({"pretrained_cfg": {"classifier": ["a", "b"]}}, ("a", "b"), ()),
        ({"pretrained_cfg": {"classifier": "a"}, "classifier": "b"}, ("b",), ()),
        ({"pretrained_cfg": {"classifier": "a"}, "num_classes": 0}, (), ()),
        ({"pretrained_cfg": None}, (), ()),
        ({"label_names": {"10": "c", "2": "b", "1": "a"}}, (), ("a", "b", "c")),
    ],
    ids=["one level", "two", "top wins", "no head", "null", "numbered"],
)
def test_names_are_found_wherever_they_stand(read, data, classifier, labels):
    found = read(data)
    assert (found.classifier, found.label_names) == (classifier, labels)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("{", " is not valid JSON: copy it again, or remove it."),
        ("[" * 100_000, " is not valid JSON: copy it again, or remove it."),
        ("[]", " is no model configuration: remove it, or copy it again."),
        ({"pretrained_cfg": 3}, " is no model configuration: remove it, or copy it again."),
        ({"classifier": 3}, ": 'classifier' must hold names: correct it."),
        ({"label_names": [1]}, ": 'label_names' must hold names: correct it."),
        ({"label_names": {"a": "b"}}, ": 'label_names' must hold names: correct it."),
    ],
)
def test_what_is_no_configuration_is_refused(read, tmp_path, data, sentence):
    with says(VectorError, f"{tmp_path}/config.json{sentence}"):
        read(data)


def test_another_number_of_classes_has_no_names(read):
    data = {
        "num_classes": 10,
        "label_names": ["x"] * 10,
        "model_args": {"num_classes": 10, "in_chans": 1},
        "pretrained_cfg": {"num_classes": 10, "label_offset": 1, "mean": [0.5]},
    }
    found = read(data).with_classes(3)
    assert found.label_names == ()
    assert found.data == {
        "num_classes": 3,
        "model_args": {"num_classes": 3, "in_chans": 1},
        "pretrained_cfg": {"num_classes": 3, "mean": [0.5]},
    }


@pytest.mark.parametrize("nested", [True, False])
def test_other_preprocessing_is_named(read, nested):
    def config(size):
        images = {"input_size": size, "mean": [0.5]}
        return read({"pretrained_cfg": images} if nested else images)

    one = config([3, 64, 64])
    assert one.other_images(config([3, 64, 64])) is None
    assert one.other_images(config([3, 96, 96])) == "input_size"
