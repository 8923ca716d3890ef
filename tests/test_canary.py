"""What a site has and must never publish: a string is planted everywhere, and searched for."""

from __future__ import annotations

import getpass
import gzip
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pydicom
import pytest
from click.testing import Result
from PIL import Image, PngImagePlugin
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from merge_kit import signing, site
from merge_kit.runs import latest_run
from tests.finetune.pictures import draw, write_csv

CLASSES = ("round", "lobed", "granular")
VARIABLES = ("USER", "LOGNAME", "USERNAME", "HOME", "HOSTNAME", "COMPUTERNAME", "PWD", "MY_TOKEN")
TAGS = (
    "PatientName", "PatientID", "InstitutionName", "ReferringPhysicianName", "StudyDescription",
    "AccessionNumber", "StationName", "OperatorsName", "PatientComments",
)  # fmt: skip


class Canaries:
    """Distinct strings, each with the place where it was planted."""

    def __init__(self) -> None:
        self.planted: dict[str, str] = {}
        self._numbers = count(10)

    def plant(self, place: str) -> str:
        """A new canary; it may stand in a file name, a DICOM field or a variable."""
        text = f"Kanarie{next(self._numbers)}Zx"
        self.planted[text] = place
        return text

    def know(self, text: str, place: str) -> None:
        """Something that is there anyhow, where it is too long to turn up by chance."""
        if len(text) >= 6 and text != "localhost":
            self.planted[text] = place

    def found(self, folder: Path) -> dict[str, str]:
        """Place of each canary that stands in a name or a byte under a folder -> the file."""
        hits = {}
        for path in [p for p in folder.rglob("*") if p.is_file()]:
            name = path.relative_to(folder).as_posix().encode()
            views = [name.lower(), *(view.lower() for view in readings(path.read_bytes()))]
            for text, place in self.planted.items():
                if any(form in view for form in forms(text) for view in views):
                    hits[place] = name.decode()
        return hits


def forms(text: str) -> list[bytes]:
    """A canary as it may stand in a file."""
    low = text.lower()
    hexadecimal = low.encode().hex().encode()
    return [low.encode(), low.encode("utf-16-le"), low.encode("utf-16-be"), hexadecimal]


def readings(data: bytes) -> Iterator[bytes]:
    """A file's bytes, and every stream of zlib, gzip or zip that begins in them, decompressed."""
    yield data
    for mark, bits in ((b"\x1f\x8b\x08", 31), (b"x\x9c", 15), (b"x\xda", 15)):
        at = data.find(mark)
        while at >= 0:
            try:
                yield zlib.decompressobj(bits).decompress(data[at:], 1 << 22)
            except zlib.error:
                pass
            at = data.find(mark, at + 1)
    at = data.find(b"PK\x03\x04")
    while at >= 0:
        begin = at + 30 + int.from_bytes(data[at + 26 : at + 28], "little")
        begin += int.from_bytes(data[at + 28 : at + 30], "little")
        try:
            yield zlib.decompressobj(-15).decompress(data[begin:], 1 << 22)
        except zlib.error:
            pass
        at = data.find(b"PK\x03\x04", at + 1)


def save_png(path: Path, pixels: np.ndarray, canaries: Canaries) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Description", canaries.plant("PNG text"))
    chunks.add_text("Comment", canaries.plant("compressed PNG text"), zip=True)
    chunks.add_itxt("Title", canaries.plant("international PNG text"))
    Image.fromarray(pixels).save(path, pnginfo=chunks)


def save_jpeg(path: Path, pixels: np.ndarray, canaries: Canaries) -> None:
    exif = Image.Exif()
    for tag, name in ((0x010E, "ImageDescription"), (0x013B, "Artist"), (0x8298, "Copyright")):
        exif[tag] = canaries.plant(f"EXIF {name}")
    Image.fromarray(pixels).save(path, exif=exif, comment=canaries.plant("JPEG comment"))


def save_dicom(path: Path, pixels: np.ndarray, canaries: Canaries) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(path, {}, file_meta=meta, preamble=bytes(128))
    for tag in TAGS:
        setattr(dataset, tag, canaries.plant(f"DICOM {tag}")[:16])
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta[0x0002, 0x0002].value, generate_uid()
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
    dataset.PlanarConfiguration, dataset.PixelRepresentation = 0, 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelData = 7, pixels.tobytes()
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


SAVERS = {"png": save_png, "jpg": save_jpeg, "dcm": save_dicom}


def write_images(folder: Path, canaries: Canaries) -> Path:
    """A table whose names, ids and other columns, and whose images, all hold canaries."""
    rows = []
    column = canaries.plant("name of a column")
    for index, label in enumerate(CLASSES):
        for number, pixels in enumerate(draw([index] * 9, seed=index)):
            kind = list(SAVERS)[number % 3]
            file = f"{canaries.plant('file name')}.{kind}"
            SAVERS[kind](folder / file, pixels, canaries)
            row = {"file": file, "label": label, "patient": canaries.plant("patient")}
            row |= {"group": "", "split": "val" if number > 5 else "train"}
            row |= {"note": canaries.plant("another column"), column: "x"}
            rows.append(row)
    return write_csv(folder / f"{canaries.plant('name of the table')}.csv", rows)


@pytest.fixture
def canaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Canaries:
    """Planted in the environment, the home and the working folder before anything else is done."""
    planted = Canaries()
    planted.know(socket.gethostname(), "host name")
    planted.know(getpass.getuser(), "user name")
    planted.know(os.path.expanduser("~"), "home")
    planted.know(str(tmp_path), "folder of all this")
    for name in VARIABLES:
        monkeypatch.setenv(name, planted.plant(f"environment variable {name}"))
    home = tmp_path / planted.plant("name of the home folder")
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return planted


@pytest.fixture
def use(run_cli) -> Callable[..., Result]:
    """A command that has to succeed."""

    def run(*arguments: object) -> Result:
        result: Result = run_cli(*arguments)
        assert result.exit_code == 0, result.output
        return result

    return run


def test_nothing_of_a_site_but_what_it_must_say_is_published(hub, canaries, use):
    root = Path(canaries.plant("name of the site's folder"))
    data = Path(canaries.plant("folder of the images"))
    data.mkdir()
    table = write_images(data, canaries)
    use("join", hub.root, "--site", "north", "--folder", root)
    key = signing.public_key(site.open_site(root).key_file)
    use("admit", hub.root, "north", key)
    options = ("--steps", 2, "--validations", 1, "--head-steps", 10, "--device", "cpu")
    use("finetune", root, "--data", table, *options)
    run = (latest_run(root)).rename(root / "runs" / canaries.plant("name of the run's folder"))
    kinds = ("--kind", "fisher", "--kind", "gram", "--max-width", 300)
    use("statistics", root, *kinds, "--device", "cpu")
    use("publish", root)
    use("merge", hub.root, "--out", Path("model"))
    contributions = list((hub.root / "contributions" / "north").iterdir())
    assert len(contributions) == 3
    for contribution in contributions:
        assert {path.name for path in contribution.iterdir()} == {
            "payload.safetensors", "manifest.json", "manifest.sig",
        }  # fmt: skip
    assert canaries.found(hub.root) == {}
    assert canaries.found(Path("model")) == {}
    secret = site.open_site(root).key_file.read_bytes().split(b"\n")[1]
    assert not any(secret in p.read_bytes() for p in hub.root.rglob("*") if p.is_file())
    # The search finds what is there: the site's own papers and images are full of canaries.
    assert {"file name", "patient", "folder of the images"} <= canaries.found(run).keys()
    images = canaries.found(data)
    expected = {"file name", "another column", "PNG text", "compressed PNG text", "EXIF Artist"}
    assert expected | {"JPEG comment", "DICOM PatientName", "DICOM StationName"} <= images.keys()


@pytest.mark.parametrize(
    "hide",
    [
        lambda text: text.encode(),
        lambda text: text.upper().encode(),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-16-be"),
        lambda text: text.lower().encode().hex().encode(),
        lambda text: zlib.compress(text.encode("utf-16-le")),
        lambda text: gzip.compress(text.encode()),
    ],
    ids=["plain", "capitals", "utf-16-le", "utf-16-be", "hexadecimal", "zlib", "gzip"],
)
def test_the_search_finds_a_canary_in_any_of_its_forms(tmp_path, hide):
    canaries = Canaries()
    (tmp_path / "file").write_bytes(b"noise" + hide(canaries.plant("somewhere")) + b"noise")
    assert canaries.found(tmp_path) == {"somewhere": "file"}


def test_the_search_finds_a_canary_in_a_name_and_in_a_zip(tmp_path):
    canaries = Canaries()
    (tmp_path / canaries.plant("name")).write_bytes(b"")
    text = canaries.plant("zip")
    np.savez_compressed(tmp_path / "arrays.npz", x=np.frombuffer(text.encode() * 9, np.uint8))
    assert canaries.found(tmp_path).keys() == {"name", "zip"}
