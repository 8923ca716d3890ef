"""Many sites publish at once to a Hugging Face repository, and some of them are killed.

python tests/benchmarks/hub_huggingface.py --sites 50 --kill 20
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.merge_kit.hub.huggingface.publishers import check, race
from tests.merge_kit.hub.huggingface.server import HubServer


def main() -> None:
    """Run the races and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--kill", type=int, default=20)
    parser.add_argument("--within", type=float, default=20.0, help="seconds")
    parser.add_argument("--size", type=int, default=2_000_000, help="bytes of a payload")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--races", type=int, default=1)
    given = parser.parse_args()
    for seed in range(given.races):
        with HubServer() as server, TemporaryDirectory() as cache:
            server.delay = given.delay
            server.tokens = {"token": "hospital"}
            server.create("hospital/federation", writers="hospital")
            found = race(
                server, "hospital/federation", "token", count=given.sites, kill=given.kill,
                within=given.within, size=given.size, seed=seed, cache=Path(cache),
            )  # fmt: skip
            check(server, "hospital/federation", count=given.sites, size=given.size)
            print(
                f"race {seed}: {given.sites} entries whole and once after {found.seconds:.1f} s; "
                f"{found.killed} killed, {found.arrived} of them had arrived; "
                f"{found.commits} tries to commit",
                flush=True,
            )


if __name__ == "__main__":
    main()
