"""A private teacher beside the federation's network: what passes between both, and what stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from finetune import network, private, training
from finetune import run as runs
from finetune.cases import load_cases
from finetune.labelling import Labelling, own_labelling
from finetune.mutual import Companion
from finetune.options import TrainingOptions, make_options
from merge_kit import site as sites
from merge_kit.errors import TrainingError, UsageError
from merge_kit.runs import latest_run
from merge_kit.tensorfile import TensorFile
from tests.finetune.pictures import write_table
from tests.finetune.test_run import Killed, Reporter, go, result
from tests.merge_kit.helpers import says

CPU = torch.device("cpu")
QUICK = TrainingOptions(
    steps=4, validations=2, batch_size=8, head_steps=10, select="last", mutual_rate=1e-3
)
COUNTS = {"round": 8, "lobed": 6, "granular": 0}


@pytest.fixture
def site(hub, tmp_path: Path):
    """A site of the federation."""
    return sites.join(hub, "north", tmp_path / "north")


@pytest.fixture
def material(site, tmp_path: Path):
    """The decoded images; none of the third class."""
    table = write_table(tmp_path / "images", COUNTS)
    return runs.prepare(site, load_cases(table, classes=site.federation.classes))


@pytest.fixture
def elsewhere(tmp_path: Path, ok) -> Path:
    """The folder of a network of another kind, which sees larger images, for two other classes."""
    ok("init", tmp_path / "other", "--backbone", "test_vit", "--weights", "none",
       "--input-size", 48, "--model-arg", "img_size=48", "--crop-pct", 1,
       "--classes", "cyst,stone")  # fmt: skip
    return tmp_path / "other" / "base"


@pytest.fixture
def options(elsewhere) -> TrainingOptions:
    """A short training beside it."""
    return QUICK.model_copy(update={"mutual": str(elsewhere)})


@pytest.fixture
def make_task(site, material, options):
    """A task with a teacher."""

    def make(**changes):
        chosen = options.model_copy(update=changes)
        labelling = Labelling(site.federation)
        torch.manual_seed(5)
        model = network.load(site.base_folder)
        nn.init.normal_(network.head_of(model).weight, std=0.1)
        task = labelling.task(model, material.train, material.validation, chosen, CPU)
        found = private.open_private(chosen.mutual, labelling)
        beside = private.teacher_of(
            found, material.train, material.validation, chosen.head_steps, site.root / "cache"
        )
        return replace(task, teacher=beside)

    return make


# What passes between both


@pytest.mark.parametrize("features", [0.0, 2.5])
def test_what_a_batch_adds_is_the_papers_sum(make_task, features):
    task = make_task(mutual_features=features)
    companion = Companion(task, 4)
    teacher, student = companion.model, task.model
    nn.init.normal_(network.head_of(teacher).weight, std=0.5)
    indices, seen = [0, 3, 9, 11], torch.tensor([True, True, False])
    view = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    outputs = student(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2)))
    loss = task.objective().loss(outputs, indices, weighted=False)
    found = companion.lesson(outputs, loss, view, indices)

    said = teacher(view)
    labels = task.train.labels()[indices]
    own = functional.cross_entropy(said[:, seen], labels)
    t, s = said[:, seen].softmax(dim=1), outputs[:, seen].softmax(dim=1)
    both = (t * (t / s).log()).sum(dim=1).mean() + (s * (s / t).log()).sum(dim=1).mean()
    head = network.head_of(teacher)
    heard = {}
    for name, model, pixels in (("t", teacher, view), ("s", student, None)):
        hook = network.head_of(model).register_forward_pre_hook(
            lambda module, inputs, name=name: heard.__setitem__(name, inputs[0])
        )
        if pixels is not None:
            model(pixels)
        hook.remove()
    generator = torch.Generator().manual_seed(2)
    hook = network.head_of(student).register_forward_pre_hook(
        lambda module, inputs: heard.__setitem__("s", inputs[0])
    )
    student(torch.randn(4, 3, 32, 32, generator=generator))
    hook.remove()
    distance = (heard["s"] @ companion.map.T - heard["t"]).square().mean()
    assert head.in_features == companion.map.shape[0]
    expected = own + (both + features * distance) / (loss + own)
    torch.testing.assert_close(found, expected)


def test_neither_moves_the_others_answer_but_by_the_features(make_task):
    """The student's gradient is that of its divergence from fixed answers, and the other way."""
    task = make_task(mutual_features=0.0)
    companion = Companion(task, 4)
    nn.init.normal_(network.head_of(companion.model).weight, std=0.5)
    outputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    view = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    loss = torch.tensor(0.7)
    companion.lesson(outputs, loss, view, [0, 1, 9, 10]).backward()
    with torch.no_grad():
        said = companion.model(view)
        own = companion.objective.loss(said, [0, 1, 9, 10], weighted=False)
        gap = outputs[:, :2].softmax(dim=1) - said[:, :2].softmax(dim=1)
    torch.testing.assert_close(outputs.grad[:, :2], gap / 4 / (loss + own))
    assert (outputs.grad[:, 2] == 0).all()


def test_the_weights_of_both_are_trained_and_unseen_rows_stay(make_task, tmp_path):
    task = make_task()
    teacher = {n: t.clone() for n, t in task.teacher.model.state_dict().items()}
    student = {n: t.clone() for n, t in task.model.state_dict().items()}
    trained = training.train(task, tmp_path / "checkpoint.pt", lambda event: None)
    moved = {n for n, t in trained.teacher.items() if not torch.equal(t, teacher[n])}
    assert moved == {n for n, _ in task.teacher.model.named_parameters()}
    assert (trained.teacher["head.weight"][2] == 0).all()
    assert torch.equal(trained.state["fc.weight"][2], student["fc.weight"][2])
    plain = task.options.model_copy(update={"mutual": None})
    alone = training.train(
        replace(make_task(), teacher=None, options=plain), tmp_path / "alone.pt", lambda event: None
    )
    assert any(not torch.equal(alone.state[n], t) for n, t in trained.state.items())
    assert alone.teacher is None


def test_a_teacher_without_weight_on_anything_but_its_answers_teaches(make_task, tmp_path):
    """After some steps beside a teacher the student agrees with it more than without one."""

    def apart(teacher: bool) -> float:
        task = make_task(
            steps=12, learning_rate=3e-3, mutual_rate=1e-6, mutual_features=0.0, head_steps=0,
            augment="none", warmup=0.0,
        )  # fmt: skip
        # A teacher that is sure of the first class, whatever it sees, and cannot learn.
        head = network.head_of(task.teacher.model)
        with torch.no_grad():
            head.bias.copy_(torch.tensor([4.0, 0.0, 0.0]))
        if not teacher:
            plain = task.options.model_copy(update={"mutual": None})
            task = replace(task, teacher=None, options=plain)
        place = tmp_path / f"{teacher}.pt"
        task.model.load_state_dict(training.train(task, place, lambda event: None).state)
        outputs = network.logits(task.model, task.validation, CPU)
        return float(outputs[:, :2].softmax(dim=1)[:, 0].mean())

    assert apart(teacher=True) > apart(teacher=False) + 0.02


# A run with a teacher


def test_a_run_leaves_the_teacher_at_the_site_as_a_timm_folder(site, material, options):
    run = go(site, material, "a", options)
    model = timm.create_model(f"local-dir:{run.folder / 'teacher'}", pretrained=True)
    config = json.loads((run.folder / "teacher" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("test_vit", 3)
    assert config["label_names"] == list(site.federation.classes)
    assert model.patch_embed.img_size == (48, 48)
    assert run.summary["teacher"]["balanced_accuracy"]["value"] is not None
    assert (run.folder / "curves.png").is_file()
    checks = [
        line for text in (run.folder / runs.METRICS).read_text().splitlines()
        if (line := json.loads(text))["event"] == "validation"
    ]  # fmt: skip
    assert [0 <= check["teacher_balanced_accuracy"] <= 1 for check in checks] == [True] * 3


def test_nothing_of_the_teacher_leaves_the_site(hub, site, material, options, ok):
    run = go(site, material, "a", options)
    ok("publish", site.root, "--run", run.folder)
    sent = [p for p in (hub.root / "contributions").rglob("*") if p.is_file()]
    assert {p.name for p in sent} == {"manifest.json", "manifest.sig", "payload.safetensors"}
    (manifest,) = (p for p in sent if p.name == "manifest.json")
    assert "teacher" not in manifest.read_text()
    assert "test_vit" not in manifest.read_text()
    with TensorFile(run.folder / runs.VECTOR) as vector:
        with TensorFile(site.base_folder / "model.safetensors") as base:
            assert set(vector.specs) <= set(base.specs)


@pytest.mark.parametrize(
    "moments",
    [
        [("teacher validation", -1)],
        [("checkpoint", 0)],
        [("step", 1)],
        [("teacher validation", 2)],
        [("step", 3), ("step", 4)],
        [("checkpoint", 4)],
    ],
    ids=str,
)
def test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one(site, material, options, moments):
    def all_of(run):
        return (*result(run), (run.folder / "teacher" / "model.safetensors").read_bytes())

    broken = go(site, material, "broken", options, *moments)
    (broken.folder / "summary.json").rename(site.root / "kept.json")
    assert all_of(broken) == all_of(go(site, material, "whole", options))


def test_a_run_does_not_go_on_with_another_teacher(site, material, options, elsewhere):
    folder = site.root / "runs" / "a"
    with pytest.raises(Killed):
        runs.finetune(site, material, options, folder, CPU, Reporter(("step", 3)))
    changed = {}
    with TensorFile(elsewhere / "model.safetensors") as file:
        changed = {name: file.read(name) * 1.5 for name in file.specs}
    save_file(changed, elsewhere / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="was made from other images, labels or a teacher than"):
        go(site, material, "a", options)


def test_another_teacher_is_another_run(site, material, options, elsewhere):
    first = runs.run_folder(site, material.cases, options, CPU)
    assert runs.run_folder(site, material.cases, QUICK, CPU) != first
    moved = elsewhere.rename(elsewhere.parent / "moved")
    again = options.model_copy(update={"mutual": str(moved)})
    assert runs.run_folder(site, material.cases, again, CPU) == first
    config = moved / "config.json"
    told = json.loads(config.read_text())
    told["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    config.write_text(json.dumps(told))
    assert runs.run_folder(site, material.cases, again, CPU) != first


def test_runs_without_a_teacher_keep_their_names(site, material):
    """They depend on none of a teacher's options."""
    other = QUICK.model_copy(update={"mutual_rate": 0.5, "mutual_features": 7.0})
    names = [runs.run_folder(site, material.cases, o, CPU) for o in (QUICK, other)]
    assert names[0] == names[1]


def test_a_teacher_that_knows_the_classes_keeps_its_classifier(site, material, options):
    first = go(site, material, "a", options)
    own = options.model_copy(update={"mutual": str(first.folder / "teacher"), "steps": 0})
    second = go(site, material, "b", own)
    with (
        TensorFile(first.folder / "teacher" / "model.safetensors") as before,
        TensorFile(second.folder / "teacher" / "model.safetensors") as after,
    ):
        assert torch.equal(before.read("head.weight"), after.read("head.weight"))
        assert (before.read("head.weight")[:2] != 0).any()


def test_factors_and_own_classes_go_with_a_teacher(hub, tmp_path, elsewhere):
    site = sites.join(hub, "north", tmp_path / "north")
    labelling = own_labelling(site.federation, ["cyst", "stone"])
    table = write_table(tmp_path / "images", {"round": 8, "lobed": 6})
    table.write_text(table.read_text().replace(",round,", ",cyst,").replace(",lobed,", ",stone,"))
    cases = load_cases(table, classes=["cyst", "stone"])
    own = runs.prepare(site, cases)
    chosen = QUICK.model_copy(update={"mutual": str(elsewhere), "steps": 1})
    done = runs.finetune(
        site, own, chosen, site.root / "runs" / "a", CPU, Reporter(), labelling=labelling
    )
    config = json.loads((done.folder / "teacher" / "config.json").read_text())
    assert config["label_names"] == ["cyst", "stone"]


# By the command


def test_the_command_says_how_the_teacher_is(hub, tmp_path, elsewhere, ok):
    root = sites.join(hub, "north", tmp_path / "north").root
    table = write_table(tmp_path / "images", COUNTS)
    quick = ("--steps", 1, "--head-steps", 5, "--batch-size", 8, "--validations", 1)
    said = ok("finetune", root, "--data", table, *quick, "--mutual", elsewhere)
    assert "  private teacher    " in said
    assert "stays here" in said
    assert (latest_run(root) / "teacher" / "model.safetensors").is_file()


def test_bad_teachers_are_refused_with_a_sentence(hub, tmp_path, run_cli, elsewhere):
    root = sites.join(hub, "north", tmp_path / "north").root
    table = write_table(tmp_path / "images", COUNTS)

    def refused(*options: object) -> str:
        found = run_cli("finetune", root, "--data", table, "--steps", 1, *options)
        assert found.exit_code not in (0, None)
        assert latest_run(root) is None
        return found.stderr

    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} is no model: it has no config.json" in refused(
        "--mutual", tmp_path / "empty"
    )
    assert "has no model 'resnet1'" in refused("--mutual", "resnet1")
    for option in ("--soup", "--sharpness"):
        assert "do not go together: a private teacher" in refused("--mutual", elsewhere, option, 2)


def test_where_no_site_trains_there_is_no_private_teacher(make_task, tmp_path):
    task = replace(make_task(), teacher=None)
    with says(UsageError, "'mutual' is for 'merge-kit finetune' alone: leave it out here."):
        training.train(task, tmp_path / "checkpoint.pt", lambda event: None)


def test_the_options_of_a_teacher_are_checked():
    assert make_options({"mutual": "resnet50"}, "x").mutual_features == 1.0
