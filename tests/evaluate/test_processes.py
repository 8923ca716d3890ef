"""evaluate as real processes: shared work, kills, and two commands side by side."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluate.document import Report
from evaluate.processes import Group
from tests.conftest import CLASSES
from tests.evaluate.helpers import draw_images

PATIENCE = 240.0
BATCHES = 5


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Enough images for five batches."""
    folder = tmp_path / "images"
    folder.mkdir()
    names = draw_images(folder, 64 * (BATCHES - 1) + 9)
    rows = [f"{name},{CLASSES[index % 3]},{'ab'[index % 2]}" for index, name in enumerate(names)]
    (folder / "labels.csv").write_text("\n".join(["file,label,site", *rows]) + "\n")
    return folder / "labels.csv"


def command(*arguments: object, launch: tuple[object, ...] = ()) -> list[str]:
    parts = (sys.executable, "-m", *launch, *(("-m",) if launch else ()), "merge_kit")
    return [str(part) for part in (*parts, *arguments)]


def start(line: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def evaluate(base: Path, table: Path, out: Path) -> list[object]:
    return ["evaluate", base, "--data", table, "--out", out, "--device", "cpu", "--resamples", 20]


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    said, wrong = process.communicate(timeout=PATIENCE)
    return process.returncode, said, wrong


def kept(out: Path) -> dict[str, bytes]:
    files = (out / "predictions").rglob("*.safetensors")
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def ranks(port: str, size: int = 2) -> list[dict[str, str]]:
    """What torchrun tells each process."""
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    return [{**here, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def test_two_processes_of_torchrun_give_the_figures_of_one(hub, table, tmp_path):
    alone = start(command(*evaluate(hub.root, table, tmp_path / "one")))
    assert end(alone)[0] == 0
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    both = start(command(*evaluate(hub.root, table, tmp_path / "two"), launch=launch))
    status, said, wrong = end(both)
    assert status == 0, wrong
    assert said.count("Next: open") == 1
    assert kept(tmp_path / "one") == kept(tmp_path / "two")
    assert len(kept(tmp_path / "two")) == BATCHES
    texts = [(tmp_path / name / "predictions.csv").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]
    reports = [
        Report.model_validate_json((tmp_path / name / "report.json").read_text())
        for name in ("one", "two")
    ]
    one, two = (report.model_copy(update={"created": ""}) for report in reports)
    assert one == two


def test_every_batch_is_of_one_process():
    shares = [list(Group(rank, 3).share(range(8))) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_a_failure_of_one_process_ends_all_with_a_sentence(hub, table, tmp_path):
    (table.parent / "64.png").write_bytes(b"broken")  # in the batch of the second process
    line = command(*evaluate(hub.root, table, tmp_path / "e"))
    pair = [start(line, **told) for told in ranks(free_port())]
    first, second = (end(process) for process in pair)
    assert (first[0], second[0]) == (1, 1)
    assert "Error: process 2 of 2 failed: " in first[2]
    assert "64.png cannot be read as an image" in first[2]
    assert "Error: " in second[2]
    assert "Traceback" not in first[2] + second[2]


def test_a_process_that_is_killed_does_not_leave_the_other_waiting(hub, table, tmp_path):
    line = command(*evaluate(hub.root, table, tmp_path / "e"))
    pair = [start(line, **told) for told in ranks(free_port())]
    deadline = time.monotonic() + PATIENCE
    while not kept(tmp_path / "e") and time.monotonic() < deadline:
        time.sleep(0.002)
    pair[1].send_signal(signal.SIGKILL)
    end(pair[1])
    status, _, wrong = end(pair[0])
    if status:  # unless the other had done its part before it was killed
        assert (status, "another process of this command ended" in wrong) == (1, True), wrong


def test_a_killed_run_goes_on_where_it_was(hub, table, tmp_path):
    line = command(*evaluate(hub.root, table, tmp_path / "e"))
    killed = start(line)
    deadline = time.monotonic() + PATIENCE
    while not kept(tmp_path / "e") and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    end(killed)
    assert not (tmp_path / "e" / "report.html").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "e").rglob("*.safetensors")}
    assert before
    assert end(start(line))[0] == 0
    assert len(kept(tmp_path / "e")) == BATCHES
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_two_commands_side_by_side_do_not_disturb_each_other(hub, table, tmp_path):
    line = command(*evaluate(hub.root, table, tmp_path / "e"))
    pair = [start(line), start(line)]
    assert [end(process)[0] for process in pair] == [0, 0]
    assert len(kept(tmp_path / "e")) == BATCHES
    assert not [path for path in (tmp_path / "e").rglob(".*")]


def test_variables_that_do_not_fit_are_said(hub, table, tmp_path, run_cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    result = run_cli(*evaluate(hub.root, table, tmp_path / "e"))
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: the processes of this command cannot find each other ('RANK'): start them with "
        "torchrun, or unset WORLD_SIZE.\n"
    )
