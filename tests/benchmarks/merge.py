"""How long a merge takes, and how much memory, beside other programs that do the same.

    python tests/benchmarks/merge.py --folder /tmp/vits --peers-python /tmp/peers/bin/python
    python tests/benchmarks/merge.py --folder /tmp/vits --only 'engine *' numpy cat
    python tests/benchmarks/merge.py --folder /tmp/sites --mode sites --sites 12 96
    python tests/benchmarks/merge.py --folder /tmp/sizes --mode size
    python tests/benchmarks/merge.py --folder /tmp/vits --only 'engine *' --device cuda

Writes a base, task vectors and fine-tuned models of the size of ViT-B/16, then runs whole processes
in turn: reading all files, importing torch, a bare numpy program that reads, adds and writes,
literal programs in torch, the peers, our engine on vectors (``engine``) and the whole of
``merge-kit merge`` on checkpoints (``command``). What cannot run is named and left out. The modes
``sites`` and ``size`` run the engine on more and more sites of a model of 22 million values, and on
a model and one of ten times its depth. With ``--device`` our programs (``engine`` and ``command``)
compute there, all others on the CPU. Files stay in the folder for the next run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from process import Failed, Run, measure
from programs import HERE, PROGRAMS, ROOT, Program, Setting

SITES = [12, 24, 48, 96, 200]
SCALED = ("mean", "ties", "median", "multislerp")
Runs = dict[tuple[str, int], list[Run]]
"""Of each program on each setting, by its place among them."""


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the files are made")
    parser.add_argument("--mode", choices=["table", "sites", "size"], default="table")
    parser.add_argument(
        "--sites", type=int, nargs="+", help="8, or 12 24 48 96 200 in the mode 'sites'"
    )
    parser.add_argument("--width", type=int, help="768, or 384 in the other modes")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of every program")
    parser.add_argument("--device", default="cpu", help="of our programs: cpu, cuda, cuda:1")
    parser.add_argument("--peers-python", type=Path, help="interpreter that has the peers")
    parser.add_argument("--only", nargs="+", help="programs to run, by name or pattern")
    parser.add_argument("--json", type=Path, help="write every figure here")
    chosen = parser.parse_args()
    settings = _settings(chosen)
    programs = _chosen(chosen.only, chosen.mode, chosen.peers_python)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if chosen.threads:
        environment["OMP_NUM_THREADS"] = str(chosen.threads)
    device = _device(chosen.device, environment)
    for setting in settings:
        _make(setting, programs, environment)
    runs = _rounds(chosen.rounds, settings, programs, environment)
    threads = environment.get("OMP_NUM_THREADS", "not set")
    print(f"{os.cpu_count()} cores, OMP_NUM_THREADS {threads}, {chosen.rounds} rounds.")
    print(f"Our programs ran on: {device}.")
    if chosen.mode == "table":
        _print_table(settings[0], programs, runs)
    else:
        _print_growth(settings, programs, runs)
    if chosen.json:
        chosen.json.write_text(json.dumps(_figures(settings, runs), indent=1))


def _settings(chosen: argparse.Namespace) -> list[Setting]:
    table, peers = chosen.mode == "table", chosen.peers_python
    width = chosen.width or (768 if table else 384)
    sites = chosen.sites or (SITES if chosen.mode == "sites" else [8])
    if len(sites) > 1 and chosen.mode != "sites":
        sys.exit("several numbers of sites are for '--mode sites'")

    def setting(sites: int, depth: int) -> Setting:
        folder = chosen.folder / f"{width}x{depth}"
        return Setting(folder, sites, width, depth, peers, chosen.device)

    if chosen.mode == "sites":
        return [setting(count, chosen.depth) for count in sites]
    if chosen.mode == "size":
        return [setting(sites[0], chosen.depth), setting(sites[0], 10 * chosen.depth)]
    return [setting(sites[0], chosen.depth)]


def _chosen(only: Sequence[str] | None, mode: str, peers: Path | None) -> list[Program]:
    """What to run; names that are no pattern may be of any method of the registry."""
    if only is None and mode != "table":
        return [Program(name) for name in ("import torch", *(f"engine {m}" for m in SCALED))]
    patterns = ["*"] if only is None else [*only]
    known = [p for p in PROGRAMS if any(fnmatchcase(p.name, pattern) for pattern in patterns)]
    names = {program.name for program in PROGRAMS}
    more = [p for p in patterns if "*" not in p and p not in names]
    if odd := [name for name in more if name.split()[0] not in ("engine", "command")]:
        sys.exit(f"no program is called '{odd[0]}': there are {', '.join(sorted(names))}")
    programs = [*known, *map(Program, more)]
    if left := [p.name for p in programs if p.of_peer and not peers]:
        print(f"left out, for want of --peers-python: {', '.join(left)}")
    return [p for p in programs if peers or not p.of_peer]


def _device(name: str, environment: dict[str, str]) -> str:
    """What it is called; ends the benchmark where it is not there."""
    # In a process of its own, as below.
    code = "import sys; from merge_kit import devices; print(devices.choose(sys.argv[1]).name)"
    command = [sys.executable, "-c", code, name]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr.splitlines()[-1])
    return done.stdout.strip()


def _make(setting: Setting, programs: Sequence[Program], environment: dict[str, str]) -> None:
    # In a process of its own: this one has to stay small, see `measure`.
    kinds = sorted({program.reads for program in programs})
    size = [f"--{k}={getattr(setting, k)}" for k in ("folder", "sites", "width", "depth")]
    subprocess.run([sys.executable, HERE / "vits.py", *size, *kinds], check=True, env=environment)


def _rounds(
    rounds: int,
    settings: Sequence[Setting],
    programs: Sequence[Program],
    environment: dict[str, str],
) -> Runs:
    """Every program once, then every program once more; what fails is not tried again."""
    runs: Runs = defaultdict(list)
    peers = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
    failed = set()
    for _ in range(rounds):
        for place, setting in enumerate(settings):
            for program in programs:
                if (program.name, place) in failed:
                    continue
                command = program.command(setting)
                try:
                    run = measure(command, peers if program.kind == "mergekit" else environment)
                except (Failed, OSError) as error:
                    failed.add((program.name, place))
                    print(f"left out: {program.name}: {error}")
                else:
                    runs[program.name, place].append(run)
    return runs


def _seconds(runs: Sequence[Run], *, inside: bool = False) -> float:
    found = [run.said.get("inside", run.seconds) if inside else run.seconds for run in runs]
    return statistics.median(found)


def _private(runs: Sequence[Run]) -> float:
    return max((run.private for run in runs), default=0.0)


def _print_table(setting: Setting, programs: Sequence[Program], runs: Runs) -> None:
    numpy = runs.get(("numpy", 0))
    floor = _private(runs.get(("import torch", 0), ()))
    print(f"{setting.sites} sites of {setting.values / 1e6:.0f} million float32 values.\n")
    print(
        "| program | seconds | range | inside | / numpy | inside / numpy | times as fast as "
        "| private MB | above torch | total MB |"
    )
    print("| --- | --: | --: | --: | --: | --: | --- | --: | --: | --: |")
    for program in programs:
        mine = runs.get((program.name, 0))
        if not mine:
            continue
        middle, spread = _seconds(mine), [run.seconds for run in mine]
        inside = f"{_seconds(mine, inside=True):.2f}" if "inside" in mine[0].said else ""
        by_numpy = f"{middle / _seconds(numpy):.2f}" if numpy else ""
        pure = f"{_seconds(mine, inside=True) / _seconds(numpy):.2f}" if numpy and inside else ""
        private = _private(mine)
        above = f"{private - floor:.0f}" if floor and program.method else ""
        cells = [
            program.name,
            f"{middle:.2f}",
            f"{min(spread):.2f} to {max(spread):.2f}",
            inside,
            by_numpy,
            pure,
            _faster(program, middle, programs, runs),
            f"{private:.0f}",
            above,
            f"{max(run.total for run in mine):.0f}",
        ]
        print(f"| {' | '.join(cells)} |")
    print(
        "\nSeconds and inside (start-up left out): medians. Private: peak of the anonymous memory, "
        "sampled; total: peak of the resident memory, with mapped files."
    )


def _faster(program: Program, seconds: float, programs: Sequence[Program], runs: Runs) -> str:
    """How many times as long the others take for the same rule."""
    if program.kind not in ("engine", "command"):
        return ""
    others = [
        (other.kind, runs[other.name, 0])
        for other in programs
        if other.method == program.method
        and other.kind in ("mergekit", "sd-mecha", "torch")
        and (other.name, 0) in runs
    ]
    return ", ".join(f"{kind} {_seconds(theirs) / seconds:.1f}" for kind, theirs in others)


def _print_growth(settings: Sequence[Setting], programs: Sequence[Program], runs: Runs) -> None:
    """Time for each value that is read, and memory: flat where both scale as they should."""
    print("\n| program | sites | million values | seconds | range | ns a value | private MB |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for program in programs:
        for place, setting in enumerate(settings):
            mine = runs.get((program.name, place))
            if not mine:
                continue
            spread = [run.seconds for run in mine]
            read = setting.sites * setting.values
            each = f"{_seconds(mine, inside=True) / read * 1e9:.2f}" if program.method else ""
            cells = [
                program.name,
                str(setting.sites),
                f"{setting.values / 1e6:.0f}",
                f"{_seconds(mine):.2f}",
                f"{min(spread):.2f} to {max(spread):.2f}",
                each,
                f"{_private(mine):.0f}",
            ]
            print(f"| {' | '.join(cells)} |")
    print("\nns a value: start-up left out, over all values of all vectors.")


def _figures(settings: Sequence[Setting], runs: Runs) -> list[dict[str, object]]:
    return [
        {
            "program": name,
            "sites": settings[place].sites,
            "width": settings[place].width,
            "depth": settings[place].depth,
            "values": settings[place].values,
            "runs": [asdict(run) for run in found],
        }
        for (name, place), found in runs.items()
    ]


if __name__ == "__main__":
    main()
