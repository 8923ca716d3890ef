"""From whom images are made, how batches are kept, and what noise-adapted teachers say of them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune import network, synthesising
from finetune.cases import read_case
from finetune.distillation import Distillation, Synthesis
from finetune.distilling import lesson
from finetune.normalizing import norm_layers
from finetune.outputs import Network
from finetune.pixels import centre, decode
from finetune.students import Begun
from finetune.synthesising import able, asked_of, make, mixed, plan, save, taught
from finetune.teachers import Teacher
from merge_kit.errors import UsageError
from tests.conftest import CLASSES
from tests.finetune.pictures import SMALL
from tests.merge_kit.helpers import says

CPU = torch.device("cpu")
NOTHING = math.nan
relaxed = settings(deadline=None, max_examples=40)


def teacher(name, known, counts, *, norms=True, loaded=None):
    told = torch.tensor(known, dtype=torch.bool), torch.tensor(counts, dtype=torch.float64)
    return Teacher(name, f"sha256:{name}", loaded, tuple(range(len(known))), *told, norms=norms)


counts = st.lists(
    st.lists(st.sampled_from([0.0, 3.0, 40.0, NOTHING]), min_size=4, max_size=4),
    min_size=1, max_size=4,
).filter(lambda rows: any(count != 0 for row in rows for count in row))  # fmt: skip


@relaxed
@given(counts, st.integers(4, 60), st.integers(1, 20), st.sampled_from(["each", "together"]))
def test_nobody_is_asked_for_what_it_has_not_seen(rows, images, size, invert):
    there = [
        teacher(str(place), [count != 3.0 for count in row], row) for place, row in enumerate(rows)
    ]
    if not any(asked_of(one).any() for one in there):
        return
    choices = Synthesis(images=images, batch_size=size, invert=invert)
    lots = plan(there, choices)
    asked = [(lot.teachers, target) for lot in lots for target in lot.targets]
    assert len(asked) == images
    for lot in lots:
        assert 1 <= len(lot.targets) <= size
        for target in lot.targets:
            assert any(bool(asked_of(one)[target]) for one in lot.teachers)
            assert len(lot.teachers) == (len(there) if invert == "together" else 1)
    classes = [c for c in range(4) if any(bool(asked_of(one)[c]) for one in there)]
    shown = [sum(target == c for _, target in asked) for c in classes]
    assert max(shown) - min(shown) <= 1
    assert sum(shown) == images
    if invert == "together":
        return
    for c in classes:
        own = [
            sum(target == c and makers == (one,) for makers, target in asked)
            for one in there
            if asked_of(one)[c]
        ]
        assert max(own) - min(own) <= 1


def test_a_site_that_knows_a_class_by_the_common_classifier_is_not_asked_for_it():
    one = teacher("a", [True, True, False], [5, 0, NOTHING])
    assert asked_of(one).tolist() == [True, False, False]
    other = teacher("b", [True, True, False], [NOTHING] * 3)
    assert asked_of(other).tolist() == [True, True, False]


def test_batches_are_of_about_the_same_size():
    lots = plan([teacher("a", [True] * 3, [1] * 3)], Synthesis(images=51))
    assert [len(lot.targets) for lot in lots] == [26, 25]


def test_fewer_images_than_classes_are_refused():
    with says(
        UsageError,
        "2 images cannot show 3 classes: have 3 synthesised at least, better ten of each.",
    ):
        plan([teacher("a", [True] * 3, [1] * 3)], Synthesis(images=2))


def test_teachers_without_batch_norm_say_what_they_make_of_the_images():
    first, second = teacher("b", [True], [1]), teacher("a", [True], [1])
    plain = teacher("vit", [True], [1], norms=False)
    chosen, others = able([first, plain, second])
    assert chosen == [second, first]
    assert others == [
        "'vit' has no batch norm: images are made from the others, and it says what it makes of "
        "them."
    ]
    with pytest.raises(UsageError, match="none of these teachers has it: learn from unlabelled"):
        able([plain])


rows = st.lists(st.floats(-20, 20), min_size=2, max_size=5)


@relaxed
@given(rows, st.floats(0, 1), st.floats(0.5, 20))
def test_a_mixture_has_the_mixed_probabilities(row, share, temperature):
    first = torch.tensor([row], dtype=torch.float64)
    second = first.flip(1)
    found = (mixed(first, second, share, temperature) / temperature).softmax(dim=1)
    p, q = ((one / temperature).softmax(dim=1) for one in (first, second))
    torch.testing.assert_close(found, share * p + (1 - share) * q)


def test_a_class_that_nobody_knows_stays_unknown_in_a_mixture():
    first = torch.tensor([[1.0, -math.inf, 0.0]], dtype=torch.float64)
    second = torch.tensor([[0.0, -math.inf, 2.0]], dtype=torch.float64)
    assert mixed(first, second, 0.5, 2.0)[0, 1] == -math.inf


@relaxed
@given(rows, st.floats(0, 1))
def test_its_divergence_differs_from_the_two_by_nothing_of_the_students(row, share):
    """What FedISCA lowers and what a student here lowers have the same gradient."""
    first = torch.tensor([row], dtype=torch.float64)
    second = first.flip(1)
    student = torch.linspace(-1, 1, len(row), dtype=torch.float64)[None].requires_grad_()
    both = [_divergence(student, told) for told in (first, second)]
    (two,) = torch.autograd.grad(share * both[0] + (1 - share) * both[1], student)
    (one,) = torch.autograd.grad(_divergence(student, mixed(first, second, share, 2.0)), student)
    torch.testing.assert_close(one, two)


def _divergence(student, told):
    logs = (student / 2).log_softmax(dim=1)
    return torch.nn.functional.kl_div(logs, (told / 2).softmax(dim=1), reduction="sum") * 4


@pytest.fixture
def teachers():
    """Two networks with batch norm; each has images of two classes."""
    made = []
    for seed, known in ((1, [True, True, False]), (2, [True, False, True])):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=3).eval()
        torch.nn.init.normal_(network.head_of(model).weight, std=1.0)
        loaded = Network(str(seed), None, f"{seed:064}", 3, SMALL, partial(copy.deepcopy, model))
        counts = [10.0 if there else 0.0 for there in known]
        made.append(teacher(f"site{seed}", known, counts, loaded=loaded))
    return made


BEGUN = Begun(timm.create_model("test_resnet", num_classes=3).eval(), "{}", SMALL, None)
SETTINGS = Synthesis(images=6, batch_size=2, steps=3, stages=1, invert="each")


def recipe(**changes):
    return Distillation(synthesis=SETTINGS.model_copy(update=changes))


@pytest.fixture
def made(teachers, tmp_path):
    """`make` with changes to the settings; `cache` and `stages` are kept."""

    def go(cache="cache", begun=BEGUN, progress=lambda name, done, of: None, whom=None, **changes):
        chosen, _ = able(whom or teachers)
        told = recipe(**changes)
        return make(chosen, told, SMALL, begun, CPU, tmp_path / cache, progress)

    return go


def test_cases_tell_what_they_show_and_from_whom(made):
    found = made(stages=3)
    assert len(found.cases) == len(found.keys) == 18
    by_image = {}
    for case in found.cases:
        by_image.setdefault(case.group, []).append(case)
    assert len(by_image) == 6
    for group in by_image.values():
        assert [case.columns["stage"] for case in group] == ["1", "2", "3"]
        assert len({case.label for case in group}) == 1
    seen = {(case.columns["teacher"], case.label) for case in found.cases}
    assert seen == {("site1", 0), ("site1", 1), ("site2", 0), ("site2", 2)}
    assert len({case.file for case in found.cases}) == 18
    assert len(set(found.keys)) == 18
    assert [found.cases[row].columns["stage"] for row in found.rows(2)] == ["2"] * 6
    assert read_case(found.cases[0]).size == (32, 32)
    assert 0 <= found.before <= 1
    assert 0 <= found.after <= 1


def test_what_is_kept_is_not_made_again(made, monkeypatch, tmp_path):
    told, calls, real = [], [], synthesising.synthesise
    monkeypatch.setattr(
        synthesising, "synthesise", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    first = made(progress=lambda name, done, of: told.append((name, done, of)))
    assert told == [("synthesising", done, 12) for done in (*range(1, 13), 12)]
    assert len(calls) == 4
    again = made()
    assert len(calls) == 4
    assert again == first
    files = sorted((tmp_path / "cache").glob("*/*.safetensors"))
    assert len(files) == 4
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    files[2].unlink()
    assert made() == first
    assert len(calls) == 6
    assert files[1].read_bytes() == content
    assert made(cache="elsewhere").keys == first.keys


def test_no_batch_begins_with_the_noise_of_another(made, tmp_path):
    """One teacher is asked for one class twice, in two batches."""
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    loaded = Network("1", None, "1" * 64, 3, SMALL, partial(copy.deepcopy, model))
    one = teacher("site", [True, False, False], [10.0, 0.0, 0.0], loaded=loaded)
    assert len(set(made(whom=[one], images=4, batch_size=2).keys)) == 4


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"steps": 4}, {"invert": "together"}, {"statistics": 0.5}, {"images": 7}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_are_other_images(made, changes):
    assert made().keys != made(**changes).keys


def test_the_order_of_the_teachers_does_not_matter(made, teachers):
    assert made(cache="other", whom=teachers[::-1]).keys == made().keys


def test_images_of_other_teachers_are_other_images(made, teachers):
    changed = replace(teachers[0], network=replace(teachers[0].network, key="7" * 64))
    made()
    calls = []
    made(whom=[changed, teachers[1]], progress=lambda name, done, of: calls.append(done))
    assert len(calls) > 1


def test_images_that_are_new_to_the_student_depend_on_it(made):
    other = timm.create_model("test_resnet", num_classes=3).eval()
    torch.nn.init.normal_(network.head_of(other).weight)
    begun = replace(BEGUN, model=other)
    assert made(begun=begun).keys == made().keys
    found = made(begun=begun, competition=5.0)
    assert found.keys != made(competition=5.0).keys
    assert all(parameter.requires_grad for parameter in other.parameters())
    smaller = SMALL.model_copy(update={"input_size": (3, 24, 24)})
    with pytest.raises(UsageError, match="sees them in another size or other colours"):
        made(begun=replace(begun, preprocessing=smaller), competition=5.0)


def test_of_finished_images_teachers_say_what_they_say_of_any(made, teachers, tmp_path):
    found = made()
    told = taught(teachers, found, recipe(), CPU, tmp_path / "outputs")
    plain = lesson(teachers, found.cases, found.keys, recipe(), CPU, tmp_path / "plain")
    assert torch.equal(told.logits, plain.logits)


def test_of_earlier_stages_noise_adapted_teachers_speak_too(made, teachers, tmp_path):
    """Worked out apart: each teacher as it is, and with the statistics of the stage's images."""
    choices = recipe(stages=4, steps=4)
    found = made(stages=4, steps=4)
    told = taught(teachers, found, choices, CPU, tmp_path / "outputs")
    plain = lesson(teachers, found.cases, found.keys, choices, CPU, tmp_path / "plain")
    last = found.rows(4)
    torch.testing.assert_close(told.logits[last], plain.logits[last], rtol=0, atol=0)
    rows = found.rows(1)
    cases = [found.cases[row] for row in rows]
    images, _ = decode(cases, SMALL)
    seen = centre(images.batch(range(len(rows))), SMALL)
    adapted = []
    for one in teachers:
        model = one.network.load()
        _measure(model, seen)
        outputs = model(seen).detach()
        adapted.append(replace(one, network=_saying(one.network, outputs)))
    noisy = lesson(adapted, cases, [found.keys[row] for row in rows], choices, CPU, None)
    expected = mixed(plain.logits[rows], noisy.logits, 0.25, choices.temperature)
    torch.testing.assert_close(told.logits[rows], expected, rtol=1e-3, atol=1e-4)
    assert float((expected - plain.logits[rows]).abs().nan_to_num().max()) > 0.01


def _measure(model, seen):
    """Running statistics of one batch, each layer behind others that go by the batch's own."""
    layers = norm_layers(model).values()
    for layer in layers:
        layer.train()
        layer.momentum = 1.0
    with torch.no_grad():
        model(seen)
    model.eval()


def _saying(loaded, outputs):
    class Told(torch.nn.Module):
        def forward(self, images):
            return outputs

    return replace(loaded, outputs={}, load=Told)


def test_images_are_written_to_look_at(made, tmp_path):
    found = made(stages=2)
    save(found, CLASSES, tmp_path / "seen")
    lines = (tmp_path / "seen" / "labels.csv").read_text().splitlines()
    assert lines[0] == "file,label,teacher,stage"
    assert len(lines) == 13
    for case, line in zip(found.cases, lines[1:], strict=True):
        name, label, _, stage = line.split(",")
        assert (label, stage) == (CLASSES[case.label], case.columns["stage"])
        with Image.open(tmp_path / "seen" / name) as image:
            assert np.array_equal(np.asarray(image), np.asarray(read_case(case)))
    with pytest.raises(UsageError, match="exists already"):
        save(found, CLASSES, tmp_path / "seen")
    save(found, ("a/b", "..", "c"), tmp_path / "odd")
    assert not list((tmp_path / "odd").glob("*/"))
