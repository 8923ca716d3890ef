"""Bad input to evaluate and compare: the exact sentence, and nothing left behind."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.bench import Bench, Table, open_bench

ROWS = Table()
row = ROWS.row
HEADER = "file,label,split\n"
GOOD = HEADER + "".join(f"{i}.png,{'round' if i % 2 else 'lobed'},test\n" for i in range(12))
SAID = "file,p_round,p_lobed,p_granular\n"


@pytest.fixture
def bench(tmp_path, hub, contribute) -> Bench:
    return open_bench(tmp_path, hub, contribute)


def evaluate(b: Bench, *arguments: object, table: str = GOOD) -> list[object]:
    return ["evaluate", *arguments, "--data", b.table(table), "--out", b.tmp / "out"]


def imported(b: Bench, text: str) -> list[object]:
    return evaluate(b, b.table(text, "said.csv"))


def likely(*lines: str) -> str:
    return SAID + "".join(f"{line}\n" for line in lines)


@row()
def no_case_in_the_split(b):
    return evaluate(b, b.hub.root, "--split", "val"), (
        "no case is in the split 'val': choose another with --split, or --split all."
    )


@row()
def a_table_of_no_case(b):
    return evaluate(b, b.hub.root, table=HEADER), (
        f"{b.data / 'labels.csv'} has a header but no image: add a line for each image."
    )


@row()
def a_case_without_a_label(b):
    return evaluate(b, b.hub.root, table=GOOD.replace("3.png,round", "3.png,")), (
        f"{b.data / 'labels.csv'} line 5 has no label: fill it in or remove the row."
    )


@row()
def a_class_that_the_model_does_not_know(b):
    return evaluate(b, b.hub.root, table=GOOD.replace("3.png,round", "3.png,flat")), (
        f"{b.data / 'labels.csv'} line 5: label 'flat' is no class of this federation "
        "(known: round, lobed, granular): correct it or pass --map flat=CLASS."
    )


@row()
def one_image_listed_twice(b):
    return evaluate(b, b.hub.root, table=GOOD + "3.png,round,test\n"), (
        f"{b.data / 'labels.csv'} line 14 lists 3.png, as does {b.data / 'labels.csv'} line 5: "
        "remove one of the two."
    )


@row(2)
def one_image_in_two_sets(b):
    other = b.table(HEADER + "3.png,round,test\n", "other.csv")
    return evaluate(b, b.hub.root, "--data", other), (
        "3.png is in two sets of data, 'other' and 'data': every case counts once; leave it out "
        "of one."
    )


@row()
def models_of_different_classes(b):
    other = b.tmp / "other"
    shutil.copytree(b.hub.root / "base", other)
    config = json.loads((other / "config.json").read_text())
    config["label_names"] = ["round", "flat", "granular"]
    (other / "config.json").write_text(json.dumps(config))
    return evaluate(b, b.hub.root, other), (
        f"{other} has the classes round, flat, granular, {b.hub.root / 'base'} has round, lobed, "
        "granular: evaluate them separately, or use 'merge-kit compare' for the classes in common."
    )


@row()
def models_without_classes_in_common(b):
    said = b.table("file,p_a,p_b\n", "said.csv")
    table = b.table(GOOD)
    return ["compare", b.hub.root, said, "--data", table, "--out", b.tmp / "out"], (
        "the models have 0 classes in common (base: round, lobed, granular; said: a, b): compare "
        "models that share two or more."
    )


@row()
def models_with_one_class_in_common(b):
    said = b.table("file,p_round,p_b\n", "said.csv")
    return ["compare", b.hub.root, said, "--data", b.table(GOOD), "--out", b.tmp / "out"], (
        "the models have 1 class in common (base: round, lobed, granular; said: round, b): compare "
        "models that share two or more."
    )


@row()
def several_classes_in_one_cell(b):
    return evaluate(b, b.hub.root, table=GOOD.replace("3.png,round", "3.png,round|lobed")), (
        f"{b.data / 'labels.csv'} line 5: label 'round|lobed' names several classes: 'merge-kit "
        "evaluate' and 'compare' read such labels with --multi-label; elsewhere give one class."
    )


@row()
def a_column_for_each_class(b):
    table = "file,round,lobed,split\n0.png,1,0,test\n"
    return evaluate(b, b.hub.root, table=table), (
        f"{b.data / 'labels.csv'} has no column 'label' but one for the class 'round': 'merge-kit "
        "evaluate' and 'compare' read such columns with --multi-label; elsewhere give one class in "
        "a column 'label'."
    )


@row()
def a_probability_that_only_python_reads(b):
    return imported(b, likely("0.png,0_0.5,.5,0")), (
        f"{b.data / 'said.csv'} line 2: the column p_round holds '0_0.5': give a probability "
        "between 0 and 1."
    )


@row(2)
def a_prevalence_in_other_digits(b):
    return evaluate(b, b.hub.root, "--prevalence", "round=.\u0661"), (
        "--prevalence round=.\u0661: give a share between 0 and 1."
    )


@row(2)
def one_of_two_external_sites_is_unknown(b):
    table = GOOD.replace("split", "split,site").replace(",test", ",test,oslo")
    return evaluate(b, b.hub.root, "--external", "oslo,rome", table=table), (
        "--external rome: no case is of this site (known: oslo)."
    )


@row(2)
def a_damaged_report_in_the_folder(b):
    (b.tmp / "out").mkdir()
    (b.tmp / "out" / "report.json").write_text("{")
    return evaluate(b, b.hub.root), (
        f"{b.tmp / 'out' / 'report.json'} is damaged, or no report of this program: choose another "
        "--out, or pass --replace."
    )


@row()
def imported_probabilities_that_do_not_sum_to_one(b):
    return imported(b, likely("0.png,.5,.6,.1")), (
        f"{b.data / 'said.csv'} line 2: the probabilities sum to 1.2, not to 1: give softmax "
        "outputs; where a case may have several classes, say so with --multi-label."
    )


@row()
def imported_probabilities_that_are_none(b):
    return imported(b, likely("0.png,.5,nan,.1")), (
        f"{b.data / 'said.csv'} line 2: the column p_lobed holds 'nan': give a probability "
        "between 0 and 1."
    )


@row()
def an_imported_case_that_is_missing(b):
    lines = [f"{i}.png,.2,.3,.5" for i in range(12) if i != 7]
    return imported(b, likely(*lines)), (
        f"{b.data / 'said.csv'} has no prediction for 7.png (1 missing in all): every model "
        "answers for the same cases."
    )


@row()
def an_imported_case_that_is_unknown(b):
    return imported(b, likely("77.png,.2,.3,.5")), (
        f"{b.data / 'said.csv'} line 2: 77.png is no image of the data (nearest: 7.png): correct "
        "the name or remove the line."
    )


@row()
def an_imported_case_that_comes_twice(b):
    return imported(b, likely("0.png,.2,.3,.5", "0.png,.2,.3,.5")), (
        f"{b.data / 'said.csv'} line 3 lists 0.png, as does line 2: remove one of the two."
    )


@row()
def imported_predictions_without_classes(b):
    return imported(b, "file,round,lobed\n0.png,1,0\n"), (
        f"{b.data / 'said.csv'} line 1 must be a header with the column file and a column "
        "p_<class> for each class (found: file, round, lobed): add it or rename the columns."
    )


@row()
def an_unknown_subgroup(b):
    return evaluate(b, b.hub.root, "--by", "splitt"), (
        f"--by splitt: {b.data / 'labels.csv'} has no such column (nearest: split): correct it."
    )


@row(2)
def a_name_that_is_not_utf8(b):
    return evaluate(b, f"a\ud800={b.hub.root}"), (
        "the name 'a\\ud800' holds a control character or one that is not UTF-8: leave it out."
    )


@row(2)
def a_title_of_two_lines(b):
    return evaluate(b, b.hub.root, "--title", "a\nb"), (
        "--title 'a\\nb' holds a control character or one that is not UTF-8: leave it out."
    )


@row(2)
def a_device_without_values(b):
    return evaluate(b, b.hub.root, "--device", "meta"), (
        "the device 'meta' is not there: use --device auto, or see 'merge-kit doctor'."
    )


@row(2)
def a_report_in_a_federation(b):
    out = b.hub.root / "base" / "report"
    return ["evaluate", b.hub.root, "--data", b.table(GOOD), "--out", out], (
        f"{out} lies in the federation in {b.hub.root}, which all sites read, and a report names "
        "the files of patients: choose another --out."
    )


@row(2)
def a_report_where_a_file_lies(b):
    out = b.table("", "file")
    return ["evaluate", b.hub.root, "--data", b.table(GOOD), "--out", out], (
        f"{out} is a file: give the folder of the report with --out."
    )


@ROWS.rows({"number": 5, "numbers": [1, 2, 3]})
def class_names_that_are_none(b, value):
    return evaluate(b, b.checkpoint("odd", label_names=value)), (
        f"{b.tmp / 'odd' / 'config.json'}: 'label_names' must hold names: correct it."
    )


@row()
def a_class_that_a_model_names_twice(b):
    model = b.checkpoint("odd", label_names=["round", "round", "granular"])
    return evaluate(b, model), (
        f"{model / 'config.json'}: two classes are called 'round': rename one."
    )


def with_card(b: Bench, text: str) -> list[object]:
    """Put figures into the card of a merged model."""
    model = b.checkpoint("merged")
    (model / "provenance.json").write_text("{}")
    (model / "README.md").write_text(text)
    return evaluate(b, model, "--cards")


@row()
def a_card_that_is_no_yaml(b):
    return with_card(b, "---\na: [\n---\n"), (
        f"{b.tmp / 'merged' / 'README.md'} cannot be read as a model card (while parsing a flow "
        "node): correct it."
    )


@row()
def a_card_whose_tags_are_a_number(b):
    return with_card(b, "---\ntags: 5\n---\n"), (
        f"{b.tmp / 'merged' / 'README.md'} cannot be read as a model card ('int' object is not "
        "iterable): correct it."
    )


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_gives_its_sentence(name, bench, run_cli):
    ROWS.check(name, bench, run_cli)


def test_a_seed_below_zero_is_wrong_use(bench, run_cli):
    result = run_cli(*evaluate(bench, bench.hub.root, "--seed", -1))
    assert result.exit_code == 2
    assert "Invalid value for '--seed': -1 is not in the range x>=0." in result.stderr
