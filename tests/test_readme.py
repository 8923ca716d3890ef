"""Every command that the README shows is run, in order, as a reader would type it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
MAKE = [block for block in BLOCKS if block.startswith("make ")]


def test_the_make_commands_are_those_that_ci_runs():
    commands = "".join(MAKE).splitlines()
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands == ["make demo", "make test"]
    assert set(commands) <= set(ci)


@pytest.mark.skipif(os.name == "nt", reason="the README's commands are for a POSIX shell")
def test_the_day_of_each_role_runs_as_written(tmp_path):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    for block in BLOCKS:
        if block in MAKE:
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    model = timm.create_model(f"local-dir:{tmp_path / 'play' / 'merged'}", pretrained=True)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
    report = json.loads((tmp_path / "play" / "report" / "report.json").read_text())
    names = [entry["name"] for entry in report["models"]]
    assert names == ["base", "first", "north", "river", "merged", "merged-ties", "calibrated"]
    assert "<title>" in (tmp_path / "play" / "report" / "report.html").read_text()


def test_links_in_the_documents_lead_somewhere():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for document in documents:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_each_recipe_in_configs_is_complete_and_named_after_its_method():
    from merge_kit.methods import METHODS
    from merge_kit.recipe import DISTILL, read_recipe

    paths = sorted((ROOT / "configs" / "merge").glob("*.yaml"))
    # Those of distillation are read by tests of their own.
    paths = [path for path in paths if not path.stem.startswith(DISTILL)]
    found = {path.stem: read_recipe(path) for path in paths}
    assert {name: recipe.method for name, recipe in found.items()} == {n: n for n in METHODS}


def test_recipes_in_the_documents_are_recipes():
    from merge_kit.recipe import make_recipe
    from merge_kit.yamlfile import yaml_value

    text = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
    shown = re.findall(r"```yaml\n(.*?)```", text, re.S)
    assert [make_recipe(yaml_value(block), "docs").method for block in shown] == ["mean"]


def test_the_training_options_in_configs_are_the_defaults():
    from finetune.options import TrainingOptions, make_options
    from merge_kit.errors import UsageError
    from merge_kit.yamlfile import read_yaml

    file = read_yaml(ROOT / "configs" / "finetune.yaml", UsageError)
    options = make_options(file.data, file.place)
    assert options == TrainingOptions()
