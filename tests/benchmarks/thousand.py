"""A hub with a thousand sites' contributions: what `status` and `pull` take.

    python -m tests.benchmarks.thousand [--count 1000] [--backbone mobilenetv2_100] [--objects]

The hub is a folder; each site has a key of its own and has signed a vector of random numbers of the
backbone's size. `status` and `pull` are the real commands, each in a process of its own: for the
first time, again when nothing has changed, and after one more site has published. The reference is
``sha256sum`` on the same files: no command that has to read them all can be faster. With
``--objects`` the same hub is then copied into a bucket of moto's S3 server on this machine, and
pulled from there: what counts is how many requests that takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from merge_kit import publishing, signing
from merge_kit.contributions import bundle, folder_of
from merge_kit.creation import create
from merge_kit.federation import FEDERATION_FILE, Policy, read_federation
from merge_kit.hub import FolderHub
from merge_kit.manifest import Manifest, read_draft
from merge_kit.site import Site, join
from tests.benchmarks.process import measure
from tests.benchmarks.publishers import objects
from tests.conftest import write_run
from tests.merge_kit.hub.objects.conftest import client


def main() -> None:
    """Make the hub, run the commands, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="Sites. Default: 1000.")
    parser.add_argument("--backbone", default="mobilenetv2_100", help="A timm architecture.")
    parser.add_argument("--objects", action="store_true", help="From an object store, too.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure_all(Path(scratch), given.count, given.backbone, in_store=given.objects)


def measure_all(scratch: Path, count: int, backbone: str, *, in_store: bool) -> None:
    """Everything, in a folder that takes two copies of the vectors."""
    hub, draw = _federation(scratch, backbone), _Drawn(scratch)
    sites = [f"site-{number:04d}" for number in range(count + 1)]
    keys = {name: signing.create_key(scratch / "keys" / name) for name in sites}
    federation = read_federation(hub.root)
    for name, key in keys.items():
        federation = federation.admit(name, key)
    hub.replace(FEDERATION_FILE, federation.to_yaml().encode(), hub.read(FEDERATION_FILE))
    joined = join(hub, sites[0], scratch / "joined")
    begun = time.perf_counter()
    for name in sites[:-1]:
        draw.publish(hub, joined, name)
    size = sum(path.stat().st_size for path in hub.root.rglob("payload.safetensors"))
    print(f"{count} contributions of {size / count / 2**20:.2f} MiB, drawn in", end=" ")
    print(f"{time.perf_counter() - begun:.0f} s")
    time.sleep(2)  # what is younger is read again

    copy = scratch / "copy"
    steps = [
        ("sha256sum", ["sh", "-c", f"find {hub.root} -name '*.safetensors' | xargs sha256sum"]),
        ("status, first", _command("status", hub.root)),
        ("status, again", _command("status", hub.root)),
        ("pull, first", _command("pull", hub.root, copy)),
        ("pull, again", _command("pull", hub.root, copy)),
    ]
    more = [
        ("status, one more site", _command("status", hub.root)),
        ("pull, one more site", _command("pull", hub.root, copy)),
    ]
    environment = {**os.environ, "MERGE_KIT_CACHE": str(scratch / "cache"), "COLUMNS": "120"}
    for what, command in steps:
        _print(what, command, environment)
    draw.publish(hub, joined, sites[-1])
    for what, command in more:
        _print(what, command, environment)
    if in_store:
        _pull_from_store(hub.root, scratch, environment)


def _pull_from_store(root: Path, scratch: Path, environment: dict[str, str]) -> None:
    with objects(scratch) as place:
        store, bucket = client(place.port), place.uri.split("/")[2]
        for path in filter(Path.is_file, root.rglob("*")):
            store.upload_file(str(path), bucket, f"hub/{path.relative_to(root)}")
        environment = {**os.environ, "MERGE_KIT_CACHE": environment["MERGE_KIT_CACHE"]}
        for what in ("pull of all", "pull again"):
            before = place.more()["requests"]
            _print(what, _command("pull", place.uri, scratch / "from-store"), environment)
            print(f"  {place.more()['requests'] - before} requests", flush=True)


@dataclasses.dataclass(frozen=True, slots=True)
class _Drawn:
    """Publishes what `finetune` would have left, of random numbers."""

    scratch: Path

    def publish(self, hub: FolderHub, joined: Site, name: str) -> None:
        site = dataclasses.replace(joined, config=joined.config.model_copy(update={"name": name}))
        run = self.scratch / "run"
        write_run(site, run, seed=int(name.rpartition("-")[2]))
        manifest = Manifest(**read_draft(run / publishing.DRAFT).model_dump())
        key = self.scratch / "keys" / name
        signature = signing.sign(key, signing.MANIFEST_CONTEXT, manifest.to_bytes())
        hub.publish(folder_of(manifest), bundle(manifest, run / publishing.VECTOR, signature))
        shutil.rmtree(run)


def _federation(scratch: Path, backbone: str) -> FolderHub:
    create(
        scratch / "hub", name="thousand", architecture=backbone, classes=list("abcdefgh"),
        weights="none", model_args={}, preprocessing={}, policy=Policy(), seed=0,
    )  # fmt: skip
    return FolderHub(scratch / "hub")


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "merge_kit", *map(str, arguments)]


def _print(what: str, command: list[str], environment: dict[str, str]) -> None:
    run = measure(command, environment)
    print(f"{what:24} {run.seconds:7.1f} s   {run.private:6.0f} MiB of memory", flush=True)


if __name__ == "__main__":
    main()
