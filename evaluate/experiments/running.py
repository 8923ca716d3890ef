"""Runs the commands of an experiment: what is done stays done, what failed is said."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TextIO

from evaluate.experiments.jobs import Fold, Job
from evaluate.processes import Group
from merge_kit.cli import COMMANDS, main
from merge_kit.errors import ExperimentError, UsageError
from merge_kit.files import write_atomic

DONE = "done"
_LOG_LINES = 12
_THREADS = "OMP_NUM_THREADS"
_POLL = 0.5
"""Seconds between looks at what other machines have done."""


def is_done(fold: Fold, job: Job) -> bool:
    """Whether the job was finished before."""
    return (fold.root / DONE / job.key).is_file()


def run(
    folds: Sequence[Fold],
    jobs: int,
    say: Callable[[str], None],
    device: str | None = None,
    group: Group | None = None,
) -> None:
    """Run every job that is not done, at most so many at once, each in a process of its own.

    Stopped at any moment, it goes on where it was: the commands resume by themselves. Of several
    machines each takes every so-many-th job of a phase, and waits for those of the others.

    Raises
    ------
    ExperimentError
        Names the first command that failed, with the end of what it said; those that run are
        waited for.
    """
    here = group or Group()
    todo = _shared_out(folds, here)
    others = {
        (fold.root, job.key): fold for fold in folds for job in fold.jobs
        if (fold.root, job.key) not in todo and not is_done(fold, job)
    }  # fmt: skip
    every, finished, waited_for = len(todo), 0, {*todo, *others}
    running: dict[Future[float], tuple[Path, Job]] = {}
    failure: str | None = None
    with _workers(jobs) as pool:
        while running or ((todo or others) and failure is None):
            for (root, key), job in list(todo.items()):
                if failure is not None or len(running) == jobs:
                    break
                if any((root, before) in waited_for for before in job.after):
                    continue
                del todo[root, key]
                running[pool.submit(_run_one, root, job, device)] = root, job
            done, _ = wait(running, timeout=_POLL if others else None, return_when=FIRST_COMPLETED)
            if others and not done:
                time.sleep(0 if running else _POLL)
            for root, key in [one for one in others if (one[0] / DONE / one[1]).is_file()]:
                del others[root, key]
                waited_for.remove((root, key))
            for future in done:
                root, job = running.pop(future)
                try:
                    seconds = future.result()
                except ExperimentError as error:
                    failure = failure or str(error)
                    continue
                except BrokenProcessPool:
                    failure = failure or f"{job.told} was killed: is there too little memory?"
                    continue
                finished += 1
                waited_for.remove((root, job.key))
                say(f"{finished}/{every} {root.name}: {_short(job)} ({seconds:.0f} s)")
    if failure is not None:
        raise ExperimentError(failure)


def _shared_out(folds: Sequence[Fold], here: Group) -> dict[tuple[Path, str], Job]:
    """The jobs that are left for this machine, in their order."""
    phases: Counter[int] = Counter()
    mine = {}
    for fold in folds:
        for job in fold.jobs:
            if phases[job.phase] % here.size == here.rank and not is_done(fold, job):
                mine[fold.root, job.key] = job
            phases[job.phase] += 1
    return mine


def _run_one(root: Path, job: Job, device: str | None) -> float:
    """In a worker: the command, all that it says in a file of its own."""
    started, log = time.monotonic(), root / "log" / f"{job.key}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    on = ("--device", device) if device and job.argv[0] in _WITH_DEVICE else ()
    with log.open("w", encoding="utf-8") as file, _speaking_to(file):
        print(f"$ {job.told}", flush=True)
        try:
            main([*job.argv, *on])
            code = 0
        except SystemExit as end:
            code = 1 if end.code else 0
        except Exception:  # a fault of ours: its traceback belongs in the log, not in the pool
            traceback.print_exc()
            code = 1
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        raise ExperimentError(
            f"this command of {root.name} failed (all it said is in {log}):\n  {job.told}\n"
            + "\n".join(f"    {line}" for line in last)
        )
    write_atomic(root / DONE / job.key, job.told + "\n")
    return time.monotonic() - started


@contextmanager
def _speaking_to(file: TextIO) -> Iterator[None]:
    """Both outputs of this process go to a file, those of libraries in C too."""
    kept = [os.dup(number) for number in (1, 2)]
    streams = sys.stdout, sys.stderr
    try:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = file
        yield
    finally:
        sys.stdout, sys.stderr = streams
        file.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


_WITH_DEVICE = ("finetune", "calibrate", "restore", "rounds", "tune", "evaluate")


@contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that share the cores out, and one load of torch where the system lets them."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {_THREADS: threads, **os.environ}
    # A command that a worker runs has no part in what torchrun started.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    with ProcessPoolExecutor(
        jobs, _context(), initializer=_settle, initargs=(environment,)
    ) as pool:
        yield pool


def _context() -> BaseContext:
    """How workers start: forked off a process that has only imported, else on their own."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        sorted({place.partition(":")[0] for place, _ in COMMANDS.values()})
    )
    return context


def _settle(environment: Mapping[str, str]) -> None:
    """In a worker: what holds here, not what held when torch was loaded."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment[_THREADS].partition(",")[0]))


def _short(job: Job) -> str:
    names = [Path(part).name for part in job.argv[1:3] if not part.startswith("--")]
    return " ".join([job.argv[0], *names[-1:]])


def listed(folds: Sequence[Fold]) -> list[str]:
    """Every command that is not done; those of one phase do not wait for each other."""
    lines = []
    for phase in sorted({job.phase for fold in folds for job in fold.jobs}):
        left = [job for fold in folds for job in fold.jobs
                if job.phase == phase and not is_done(fold, job)]  # fmt: skip
        if left:
            lines += [f"# phase {phase}", *[job.told for job in left]]
    return lines


def check_jobs(jobs: int) -> None:
    """Refuse a number that no machine has use for."""
    if not 1 <= jobs <= 256:
        raise UsageError(f"--jobs {jobs}: give 1 to 256 processes.")
