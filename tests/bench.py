"""Tables of bad input: what to type, and the sentence and exit status that must come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from click.testing import Result
from PIL import Image

from merge_kit import publishing, site
from merge_kit.files import sha256_file
from merge_kit.hub import FolderHub
from merge_kit.manifest import read_draft
from merge_kit.tensorfile import TensorFile, read_all, write_tensors
from tests.conftest import nudge, write_run

Row = Callable[["Bench"], tuple[list[object], str]]


class Table(dict[str, tuple[Row, int]]):
    """Rows by name: a function of the bench, and the exit status."""

    def row(self, status: int = 1) -> Callable[[Row], Row]:
        """Register a row: what to type, and the sentence that must come back."""

        def register(function: Row) -> Row:
            self[function.__name__] = function, status
            return function

        return register

    def rows(self, values: dict[str, object], status: int = 1) -> Callable[..., None]:
        """Register a row for each value; the function gets the bench and the value."""

        def register(function: Callable[[Bench, object], tuple[list[object], str]]) -> None:
            for key, value in values.items():
                name = f"{function.__name__}-{key}"
                self[name] = (lambda bench, value=value: function(bench, value)), status

        return register

    def check(self, name: str, bench: Bench, run_cli: Callable[..., Result]) -> None:
        """The exact sentence, the exit status, and nothing left behind."""
        make, status = self[name]
        arguments, sentence = make(bench)
        before = sorted(bench.tmp.rglob("*"))
        result = run_cli(*arguments)
        assert result.stderr == f"Error: {sentence}\n"
        assert result.exit_code == status
        after = [p for p in bench.tmp.rglob("*") if p not in before and "cache" not in p.parts]
        assert after == []


@dataclass
class Bench:
    """A federation with one joined site and a small image folder."""

    tmp: Path
    hub: FolderHub
    site: site.Site
    contribute: Callable[..., publishing.Parcel]

    @property
    def data(self) -> Path:
        return self.tmp / "data"

    def table(self, text: str | bytes, name: str = "labels.csv") -> Path:
        path = self.data / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def finetune(self, data: Path, *more: object) -> list[object]:
        return ["finetune", self.site.root, "--data", data, "--steps", 1, *more]

    def publish_altered(self, alter: Callable[[dict[str, torch.Tensor]], None]) -> str:
        """Publish a vector that a faulty site has signed; return how messages name it."""
        run = self.site.root / "runs" / "bad"
        write_run(self.site, run)
        path = run / publishing.VECTOR
        with TensorFile(path) as file:
            tensors, metadata = dict(read_all(file)), next(iter(file.metadata.items()))
        alter(tensors)
        write_tensors(path, tensors, metadata)
        return self.publish_file(run)

    def publish_bytes(self, content: bytes) -> str:
        """Publish and sign any bytes in place of a vector."""
        run = self.site.root / "runs" / "bad"
        write_run(self.site, run)
        (run / publishing.VECTOR).write_bytes(content)
        return self.publish_file(run)

    def publish_file(self, run: Path) -> str:
        path, draft = run / publishing.VECTOR, read_draft(run / publishing.DRAFT)
        payload = {"sha256": sha256_file(path), "size": path.stat().st_size, "norm": 1.0}
        data = {**draft.model_dump(mode="json"), "payload": payload}
        (run / publishing.DRAFT).write_text(json.dumps(data))
        parcel = publishing.prepare(self.site, run, self.hub)
        publishing.publish(self.site, run, self.hub, parcel)
        folder = self.hub.root / "contributions" / self.site.name / parcel.manifest.id
        return str(folder / "payload.safetensors")

    def merge(self, problem: str) -> tuple[list[object], str]:
        """Merge what a faulty site has published: the problem, and the way out."""
        sentence = f"{problem} Leave it out with --exclude north or --skip-refused."
        return ["merge", self.hub.root, "--allow-unsigned", "--out", self.tmp / "out"], sentence

    @property
    def base(self) -> Path:
        """The federation's base as a plain timm folder."""
        return self.hub.root / "base"

    def checkpoint(
        self,
        name: str,
        alter: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
        **config: object,
    ) -> Path:
        """A timm folder, made from the base by `nudge` and by `alter`."""
        change = nudge(len(name))
        with TensorFile(self.base / "model.safetensors") as file:
            tensors = {
                key: change(key, t) if t.is_floating_point() else t for key, t in read_all(file)
            }
        alter(tensors)
        write_tensors(self.tmp / name / "model.safetensors", tensors)
        data = {**json.loads((self.base / "config.json").read_bytes()), **config}
        (self.tmp / name / "config.json").write_text(json.dumps(data))
        return self.tmp / name

    def plain(self, *more: object) -> list[object]:
        """Merge without a federation."""
        return ["merge", self.base, *more, "--out", self.tmp / "out"]

    def file(self, name: str, **tensors: torch.Tensor) -> Path:
        """A bare safetensors file; `__` stands for a dot."""
        path = self.tmp / f"{name}.safetensors"
        write_tensors(path, {key.replace("__", "."): t for key, t in tensors.items()})
        return path


def open_bench(tmp: Path, hub: FolderHub, contribute: Callable[..., publishing.Parcel]) -> Bench:
    """Join the site north, and draw its images."""
    joined = site.join(hub, "north", tmp / "north")
    (tmp / "data").mkdir()
    for index in range(12):
        Image.new("RGB", (40, 40), (index * 20, 90, 200 - index * 10)).save(
            tmp / "data" / f"{index}.png"
        )
    return Bench(tmp, hub, joined, contribute)
