"""merge-kit select on a real federation and generated images."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from evaluate.document import Report
from merge_kit.checkpoints import WEIGHTS
from merge_kit.recipe import read_recipe
from merge_kit.writing import PROVENANCE
from tests.conftest import CLASSES, nudge
from tests.evaluate.helpers import draw_images, head_for

SITES = ("north", "south", "west")


@pytest.fixture
def table(tmp_path):
    """Twelve images for validation; those for testing cannot be read.

    Each of six patients has two images; patients of two sites have the same names.
    """
    folder = tmp_path / "images"
    folder.mkdir()
    rows = ["file,label,site,patient,split"]
    for index, file in enumerate(draw_images(folder, 12)):
        rows.append(f"{file},{CLASSES[index % 3]},{'ab'[index // 2 % 2]},p{index // 2 % 3},val")
    for index in range(3):
        (folder / f"test{index}.png").write_bytes(b"not to be looked at")
        rows.append(f"test{index}.png,{CLASSES[index]},a,q{index},test")
    path = folder / "labels.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def three(hub, federation, contribute, table):
    """Three sites whose models are right now and then; their bodies differ too."""
    known = table.with_name("known.csv")
    lines = [line for line in _lines(table) if "test" not in line]
    known.write_text("\n".join(lines) + "\n")
    for seed, name in enumerate(SITES):
        logits = np.random.default_rng(seed).normal(size=(12, 3)) + np.tile(np.eye(3), (4, 1))
        head = head_for(hub.root / "base", federation, known, logits.tolist())
        contribute(name, change=after(nudge(seed), head))
    return hub.root


def after(first, then):
    return lambda name, tensor: then(name, first(name, tensor))


@pytest.fixture
def select(three, table, tmp_path, run_cli):
    """Run the command on three sites; the recipe goes to a folder of its own."""

    def run(*more):
        where = ("--out-recipe", tmp_path / "chosen" / "recipe.yaml")
        return run_cli("select", three, "--data", table, *where, *more)

    return run


@pytest.fixture
def written(tmp_path):
    """What the command has written: the recipe and the table."""

    def read():
        folder = tmp_path / "chosen"
        return read_recipe(folder / "recipe.yaml"), json.loads(
            (folder / "selection.json").read_text()
        )

    return read


def chosen_of(table):
    (found,) = [candidate for candidate in table["candidates"] if candidate["chosen"]]
    return found


@pytest.mark.parametrize(
    "search",
    [
        ("--method", "ties", "--grid", "density=0.2,0.6", "--scales", "4,0.5,20"),
        ("--method", "sum", "--head", "method", "--metric", "macro_auroc", "--scales", "1,3"),
        ("--search", "greedy-soup"),
        ("--search", "greedy-soup", "--accept", "better", "--metric", "macro_auroc"),
    ],
    ids=["grid", "scales", "soup", "strict soup"],
)
def test_the_best_figure_is_that_of_the_merged_folder(
    select, written, table, tmp_path, run_cli, search
):
    result = select(*search, "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    _, found = written()
    best, metric = chosen_of(found), found["metric"]
    values = [candidate["value"] for candidate in found["candidates"]]
    assert best["value"] == max(values) > min(values)
    out = tmp_path / "evaluation"
    run_cli("evaluate", tmp_path / "merged", "--data", table, "--split", "val", "--out", out)
    (model,) = Report.model_validate_json((out / "report.json").read_text()).models
    figure = model.on("union").figures[metric].model_dump()
    for key in ("value", "low", "high", "n"):
        assert figure[key] == pytest.approx(best[key])


@pytest.mark.parametrize(
    "search",
    [
        ("--scales", "0.5,3", "--exclude", "south"),
        ("--search", "greedy-soup", "--accept", "better"),
    ],
    ids=["scale", "soup"],
)
def test_the_command_that_is_shown_merges_the_chosen_model(
    select, written, tmp_path, run_cli, monkeypatch, search
):
    shown = select(*search)
    assert shown.exit_code == 0, shown.stderr
    again = select(*search, "--out", tmp_path / "merged", "--replace")
    assert again.exit_code == 0, again.stderr
    _, found = written()
    record = json.loads((tmp_path / "merged" / PROVENANCE).read_text())
    assert sorted(c["site"] for c in record["contributions"]) == sorted(chosen_of(found)["sites"])
    command = shlex.split(shown.stdout.split("merge by it with\n")[1])
    monkeypatch.chdir(tmp_path / "chosen")
    assert run_cli(*command[1:]).exit_code == 0
    files = [folder / WEIGHTS for folder in (tmp_path / "merged", tmp_path / "chosen" / "merged")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_recipe_says_where_it_comes_from(select, written, tmp_path):
    select("--search", "greedy-soup", "--accept", "better")
    recipe, found = written()
    sites = chosen_of(found)["sites"]
    left_out = [site for site in SITES if site not in sites]
    assert left_out
    assert (recipe.method, recipe.weights, recipe.scale) == ("mean", "uniform", 1.0)
    lines = (tmp_path / "chosen" / "recipe.yaml").read_text().splitlines()
    assert lines[:4] == [
        "# Chosen by 'merge-kit select' among 5 candidates:",
        f"# balanced accuracy {chosen_of(found)['value']:.3f} on 12 validation images.",
        f"# Sites: {', '.join(sites)}",
        f"# Left out: {', '.join(left_out)}",
    ]


def test_every_candidate_is_shown_and_the_figure_is_called_too_good(select):
    result = select("--method", "ties", "--grid", "density=0.2,0.6", "--scales", "1,2")
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[:2]] for row in rows] == [
        ["0.2", "1"],
        ["0.2", "2"],
        ["0.6", "1"],
        ["0.6", "2"],
    ]
    assert sum("chosen" in row[3] for row in rows) == 1
    assert (
        "The figure of the chosen model is too good: it was chosen on these very images. "
        "'merge-kit evaluate' needs other ones.\n"
    ) in result.stdout


def test_patients_are_drawn_whole_for_the_interval(select, written, table):
    select("--scales", "1")
    by_patient = chosen_of(written()[1])
    lines = [",".join(line.split(",")[i] for i in (0, 1, 2, 4)) for line in _lines(table)]
    table.write_text("\n".join(lines) + "\n")
    select("--scales", "1", "--replace")
    by_image = chosen_of(written()[1])
    assert by_patient["value"] == by_image["value"]
    assert (by_patient["low"], by_patient["high"]) != (by_image["low"], by_image["high"])


def _lines(table):
    return table.read_text().splitlines()


def test_all_images_are_taken_when_asked_for(select, written, table):
    lines = [line.rsplit(",", 1)[0] for line in _lines(table) if "test" not in line]
    table.write_text("\n".join(lines) + "\n")
    assert select("--scales", "1").exit_code == 1
    result = select("--scales", "1", "--split", "all")
    assert result.exit_code == 0, result.stderr
    assert chosen_of(written()[1])["n"] == 12


def test_an_unreadable_image_is_left_out_when_asked_for(select, written, table):
    (table.parent / "3.png").write_bytes(b"broken")
    result = select("--scales", "1", "--skip-unreadable")
    assert result.exit_code == 0, result.stderr
    assert "Left out:" in result.stderr
    assert chosen_of(written()[1])["n"] == 11


def test_a_class_without_an_image_is_said(select):
    result = select("--scales", "1", "--where", "label=round")
    assert result.exit_code == 0, result.stderr
    assert "Note: no image is of the class lobed, granular: it has no say." in result.stderr


def test_scales_are_factors_of_a_recipes_own(select, written, tmp_path):
    path = tmp_path / "start.yaml"
    path.write_text("method: ties\nscale: 0.75\noptions: {density: 0.5}\n")
    result = select("--recipe", path, "--scales", "2")
    assert result.exit_code == 0, result.stderr
    recipe, _ = written()
    assert (recipe.method, recipe.scale, recipe.options["density"]) == ("ties", 1.5, 0.5)


REFUSED = {
    "scales of words": (
        ("--scales", "1;2"),
        2,
        "--scales 1;2: write numbers with commas between them, such as 0.25,0.5,1.",
    ),
    "an infinite scale": (
        ("--scales", "1,inf"),
        2,
        "--scales: every scale must be a finite number: correct it.",
    ),
    "a grid of lists": (
        ("--method", "ties", "--grid", "density={"),
        2,
        "--grid: a value is not a plain number or word.",
    ),
    "a grid of an option that is set": (
        ("--method", "ties", "--grid", "density=0.1,0.2", "--option", "density=0.3"),
        2,
        "--grid and --option both set 'density': give one of them.",
    ),
    "an unknown option": (
        ("--method", "ties", "--grid", "densty=0.1,0.2"),
        1,
        "--grid, options of ties: unknown key 'densty'; did you mean 'density'?",
    ),
    "scales of a soup": (
        ("--search", "greedy-soup", "--scales", "1"),
        2,
        "--scales and --grid go with --search scale: leave them out.",
    ),
    "a soup of another method": (
        ("--search", "greedy-soup", "--method", "ties"),
        2,
        "a greedy soup is the plain mean of the sites that it chooses: take the method 'mean' with "
        "the weights 'uniform', and no scale, groups or lines.",
    ),
    "accept without a soup": (
        ("--accept", "better"),
        2,
        "--accept goes with --search greedy-soup: leave it out.",
    ),
    "a recipe and its options": (
        ("--recipe", "ties", "--norm", "base"),
        2,
        "--recipe says it all: leave the other merge options out, or edit it.",
    ),
    "too many sites": (
        ("--method", "slerp"),
        1,
        "'slerp' merges at most 2 vectors, there are 3: choose with --site, or take another "
        "method.",
    ),
    "a site that is not there": (
        ("--site", "east"),
        1,
        "no contribution of site 'east' is there; there are north, south, west.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_gives_its_sentence_and_leaves_nothing(select, tmp_path, name):
    arguments, status, sentence = REFUSED[name]
    before = sorted(tmp_path.rglob("*"))
    result = select(*arguments)
    assert (result.stderr, result.exit_code) == (f"Error: {sentence}\n", status)
    assert sorted(tmp_path.rglob("*")) == before


def test_test_images_are_refused(select, table, tmp_path):
    result = select("--split", "all")
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {table} has 3 images of the split 'test', which must not choose a model: leave "
        "--split all out, or take other rows with --where.\n"
    )
    assert not (tmp_path / "chosen").exists()


def test_an_existing_folder_is_refused_before_any_work(select, table, tmp_path):
    (tmp_path / "merged").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "merged" / "mine.png")
    result = select("--out", tmp_path / "merged")
    assert result.stderr == (
        f"Error: {tmp_path / 'merged'} exists already: choose another --out, or pass --replace.\n"
    )
    result = select("--out", tmp_path / "merged", "--replace")
    assert result.stderr == (
        f"Error: {tmp_path / 'merged'} is no merged model: --replace does not remove it.\n"
    )
    assert not (tmp_path / "chosen").exists()


@pytest.mark.parametrize("name", ["recipe.yaml", "selection.json"])
def test_an_earlier_choice_is_replaced_when_asked(select, written, tmp_path, name):
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / name).write_text("earlier")
    result = select("--scales", "1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"Error: {tmp_path}/chosen/{name} is of an earlier choice: give this one a folder of its "
        "own with --out-recipe, or pass --replace to lose the earlier one.\n"
    )
    assert select("--scales", "1", "--replace").exit_code == 0
    assert written()[0].scale == 1.0


def test_a_recipe_that_cannot_be_written_is_refused_before_the_work(select, tmp_path):
    (tmp_path / "folder").mkdir()
    result = select("--scales", "1", "--out-recipe", tmp_path / "folder")
    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: {tmp_path}/folder is a folder: --out-recipe takes the name of a file.\n"
    )
    assert result.stdout == ""
