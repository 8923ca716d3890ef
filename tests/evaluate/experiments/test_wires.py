"""Accuracy against bytes: which merges belong together, and what is drawn of them."""

from __future__ import annotations

import io

from PIL import Image

from evaluate.experiments import wires
from evaluate.experiments.config import Experiment
from evaluate.experiments.results import Line

SUM = {"options": "--method sum", "calibrate": True}
TOLD = {
    "name": "t", "data": "x.csv", "backbone": {"name": "test_resnet"},
    "merges": {
        "mean": {}, "sum": SUM, "sum-half": {**SUM, "compress": "bf16"},
        "sum-small": {**SUM, "compress": "topk:0.1"}, "mean-alone": {"compress": "int8"},
        "ties": {"options": "--method ties", "compress": "int8"},
    },
}  # fmt: skip


def line(model, union, worst):
    return Line(model, {"union": union, "worst_site": worst}, {}, 1.0, 2, None)


LINES = [
    line("sum", 0.9, 0.7), line("sum-half", 0.89, 0.71), line("sum-small", 0.85, 0.6),
    line("mean", 0.8, 0.5), line("mean-alone", 0.81, 0.52), line("ties", 0.7, 0.3),
]  # fmt: skip
MEGABYTES = {"": 9.0, "bf16": 4.5, "topk:0.1": 1.4, "int8": 2.3}


def test_merges_that_differ_in_their_bytes_alone_make_a_curve():
    found = wires.curves(Experiment.model_validate(TOLD), LINES, MEGABYTES)
    assert list(found) == ["mean", "sum"]
    assert [(p.how, p.megabytes, p.union, p.worst_site) for p in found["sum"]] == [
        ("whole", 9.0, 0.9, 0.7), ("bf16", 4.5, 0.89, 0.71), ("topk:0.1", 1.4, 0.85, 0.6),
    ]  # fmt: skip
    assert [p.how for p in found["mean"]] == ["whole", "int8"]


def test_the_picture_can_be_opened():
    found = wires.curves(Experiment.model_validate(TOLD), LINES, MEGABYTES)
    with Image.open(io.BytesIO(wires.draw(found))) as picture:
        picture.load()
        assert picture.size[0] > 900
