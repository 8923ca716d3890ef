"""Seeded, made-up images of blood-cell-like objects: the demo's hospitals and its public set.

Nothing here is a picture of a patient. A cell is drawn as three dye densities (nuclear, acid and
basic), and light passes through them as through a real smear, by the law of Beer and Lambert:
`I = I_0 exp(-OD)`, with one optical density per dye and colour channel (Ruifrok and Johnston 2001,
Anal Quant Cytol Histol 23:291-299). The hospitals differ in light, dyes, magnification, focus,
contrast and sensor, so a model of one hospital meets a real shift at the next. Two calls with one
seed write the same bytes, as long as numpy and Pillow stay the same.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from merge_kit.errors import UsageError

Floats = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]  # x, y in pixels: one point (2,) or a polygon (n, 2)
Rng = np.random.Generator
Range = tuple[float, float]
Colour = tuple[float, ...]  # red, green, blue

SIDE = 72  # px of a finished image, before any model's resizing
SPLITS = {"train": 0.60, "val": 0.15, "test": 0.25}
_OVERSAMPLING = 4  # masks are drawn this much larger and averaged: smooth edges
_Y, _X = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j].astype(np.float32)
_ANGLES = np.linspace(0, 2 * np.pi, 40, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


@dataclass(frozen=True, slots=True)
class CellKind:
    """How cells of one class look; each range is drawn from uniformly, anew for every cell.

    Lengths in pixels of an image at magnification 1, or as fractions of the cell's radius where
    the comment says so; angles in radians; densities without unit (1 = a well-stained nucleus).
    """

    radius: Range
    elongation: Range = (1.0, 1.2)
    bend: Range | None = None  # None: a rounded body; else a tapering one, bent by this angle
    pallor: float = 0.0  # how much paler the middle of a cell without nucleus is
    nuclei: int = 1
    nucleus: Range = (0.5, 0.6)  # half the nucleus' thickness, fraction of the radius
    arc: Range = (0.0, 0.0)  # how far the nucleus winds around a point beside it
    arc_radius: float = 0.5  # distance of the nucleus' midline from that point, fraction
    lobes: tuple[int, int] = (1, 1)
    pinch: Range = (0.0, 0.0)  # how thin the nucleus is between lobes: 0 not at all, 1 cut
    offset: Range = (0.0, 0.2)  # how far the nucleus lies from the middle, fraction
    granules: tuple[int, int] = (0, 0)
    granule_radius: Range = (0.9, 1.4)
    granule_acid: Range = (0.0, 0.0)  # density of the acid dye in granules
    granule_nuclear: Range = (0.0, 0.0)  # density of the nuclear dye in granules
    vacuoles: tuple[int, int] = (0, 0)
    acid: Range = (0.1, 0.3)  # density of the acid dye in the cytoplasm
    basic: Range = (0.1, 0.4)  # density of the basic dye in the cytoplasm


@dataclass(frozen=True, slots=True)
class Acquisition:
    """How one laboratory stains, lights and photographs.

    `light` is the colour of the empty slide in 0..1; `dyes` the optical densities in red, green
    and blue of the nuclear, acid and basic dye at density 1; `blur` a standard deviation in pixels;
    `gradient` the relative change of brightness from the centre to a border; `noise` a standard
    deviation in 0..1; `red_cells` the expected number in the background; `spread` how much dyes
    and light vary between patients, as the standard deviation of their logarithm.
    """

    light: Colour
    dyes: tuple[Colour, ...]
    magnification: float
    blur: float
    contrast: float
    gradient: float
    noise: float
    red_cells: float
    spread: float = 0.10


@dataclass(frozen=True, slots=True)
class Hospital:
    """One made-up hospital: its laboratory, number of images, and share of each of `CLASSES`."""

    acquisition: Acquisition
    images: int
    mix: tuple[float, ...]


KINDS: Mapping[str, CellKind] = {
    "lymphocyte_like": CellKind(radius=(13, 20), nucleus=(0.60, 0.86), offset=(0.0, 0.18),
        acid=(0.0, 0.25), basic=(0.1, 0.65)),
    "monocyte_like": CellKind(radius=(17, 25), elongation=(1.0, 1.35), nucleus=(0.28, 0.42),
        arc=(1.0, 3.4), arc_radius=0.38, lobes=(1, 2), pinch=(0.0, 0.3), offset=(0.0, 0.2),
        vacuoles=(0, 5), granules=(0, 30), granule_radius=(0.5, 0.7), granule_acid=(0.1, 0.4),
        acid=(0.05, 0.35), basic=(0.1, 0.5)),
    "neutrophil_like": CellKind(radius=(16, 22), nucleus=(0.20, 0.28), arc=(3.0, 5.2),
        arc_radius=0.46, lobes=(2, 5), pinch=(0.6, 0.95), offset=(0.0, 0.15), granules=(15, 60),
        granule_radius=(0.5, 0.8), granule_acid=(0.1, 0.5), acid=(0.1, 0.4), basic=(0.0, 0.35)),
    "eosinophil_like": CellKind(radius=(16, 22), nucleus=(0.24, 0.36), arc=(1.6, 3.4),
        arc_radius=0.48, lobes=(2, 3), pinch=(0.4, 0.9), offset=(0.05, 0.25), granules=(40, 110),
        granule_radius=(0.9, 1.5), granule_acid=(0.6, 1.5), acid=(0.1, 0.5), basic=(0.0, 0.35)),
}  # fmt: skip
"""The classes of the demo's federation, in their order."""

PUBLIC_KINDS: Mapping[str, CellKind] = {
    "erythrocyte_like": CellKind(radius=(13, 20), nuclei=0, pallor=0.7, acid=(0.5, 1.0),
        basic=(0.0, 0.2)),
    "sickle_like": CellKind(radius=(15, 23), bend=(1.2, 2.6), nuclei=0, acid=(0.5, 1.0),
        basic=(0.0, 0.3)),
    "spindle_like": CellKind(radius=(20, 28), bend=(0.1, 0.8), nucleus=(0.16, 0.24),
        acid=(0.1, 0.4), basic=(0.1, 0.5)),
    "plasma_like": CellKind(radius=(17, 23), elongation=(1.15, 1.5), nucleus=(0.36, 0.48),
        offset=(0.32, 0.5), acid=(0.0, 0.2), basic=(0.6, 1.2)),
    "binucleate_like": CellKind(radius=(17, 24), nuclei=2, nucleus=(0.26, 0.38),
        offset=(0.38, 0.5)),
    "megakaryocyte_like": CellKind(radius=(23, 30), nucleus=(0.2, 0.34), arc=(3.0, 6.0),
        arc_radius=0.4, lobes=(4, 8), pinch=(0.2, 0.7), acid=(0.1, 0.5), granules=(0, 40),
        granule_radius=(0.5, 0.8), granule_acid=(0.2, 0.6)),
    "mast_like": CellKind(radius=(16, 23), nucleus=(0.35, 0.5), granules=(60, 130),
        granule_radius=(0.9, 1.7), granule_nuclear=(0.4, 0.9), granule_acid=(0.0, 0.8)),
    "macrophage_like": CellKind(radius=(20, 27), elongation=(1.0, 1.4), nucleus=(0.28, 0.42),
        arc=(0.0, 1.5), arc_radius=0.3, offset=(0.2, 0.45), vacuoles=(6, 16)),
}  # fmt: skip
"""The classes of the public set: other cells, told apart by the same sort of features."""

CLASSES, PUBLIC_CLASSES = tuple(KINDS), tuple(PUBLIC_KINDS)

_NEUTRAL = Acquisition(
    light=(0.94, 0.92, 0.90), dyes=((1.05, 1.55, 0.60), (0.14, 0.70, 0.62), (0.50, 0.40, 0.18)),
    magnification=1.0, blur=0.5, contrast=1.0, gradient=0.05, noise=0.015, red_cells=4.0,
    spread=0.35)  # fmt: skip

HOSPITALS: Mapping[str, Hospital] = {
    "north": Hospital(Acquisition(  # beige slides, sharp
        light=(0.98, 0.91, 0.80), dyes=((1.10, 1.70, 0.55), (0.16, 0.62, 0.66), (0.52, 0.44, 0.12)),
        magnification=1.0, blur=0.4, contrast=1.05, gradient=0.04,
        noise=0.012, red_cells=6.0), images=220, mix=(0.3, 0.2, 0.3, 0.2)),
    "river": Hospital(Acquisition(  # grey-blue light, out of focus, violet nuclei, enlarged
        light=(0.80, 0.84, 0.86), dyes=((0.95, 1.00, 0.16), (0.05, 0.45, 0.22), (0.45, 0.32, 0.02)),
        magnification=1.15, blur=1.1, contrast=0.85, gradient=0.12,
        noise=0.012, red_cells=3.0), images=180, mix=(0.25, 0.3, 0.15, 0.3)),
    "hill": Hospital(Acquisition(  # crowded pink slides, dark dyes, hard contrast, dim corners
        light=(0.97, 0.88, 0.90), dyes=((1.50, 2.00, 0.95), (0.10, 0.95, 0.70), (0.62, 0.60, 0.30)),
        magnification=0.85, blur=0.5, contrast=1.25, gradient=0.22,
        noise=0.02, red_cells=11.0, spread=0.16), images=150, mix=(0.25, 0.3, 0.45, 0.0)),
    "coast": Hospital(Acquisition(  # yellow lamp, reddish-brown nuclei, an old and noisy camera
        light=(0.96, 0.88, 0.60), dyes=((0.60, 1.45, 0.70), (0.10, 0.55, 0.30), (0.30, 0.34, 0.05)),
        magnification=1.05, blur=0.9, contrast=0.9, gradient=0.10,
        noise=0.023, red_cells=3.0), images=180, mix=(0.35, 0.15, 0.3, 0.2)),
}  # fmt: skip
"""The four hospitals; `hill` has never seen an `eosinophil_like` cell."""


def generate_hospitals(folder: Path, *, seed: int = 0) -> dict[str, Path]:
    """Write `<folder>/<hospital>/images/*.png` and `labels.csv` for each of `HOSPITALS`.

    Images are RGB PNGs of 72 x 72 pixels; `labels.csv` has the columns file, label, patient and
    split, with files relative to the hospital's folder. Each patient is in one split only.

    Returns the folder of each hospital. Raises `UsageError` for a negative seed.
    """
    for name, hospital in HOSPITALS.items():
        rows = []
        for i, (label, patient, split) in enumerate(_plan(name, hospital, _rng(seed, name))):
            file = f"images/{name}_{i:04d}.png"
            acquisition = _vary(hospital.acquisition, _rng(seed, patient))
            _save(folder / name / file, KINDS[label], acquisition, _rng(seed, name, i))
            rows.append((file, label, patient, split))
        _write_table(folder / name / "labels.csv", ("file", "label", "patient", "split"), rows)
    return {name: folder / name for name in HOSPITALS}


def generate_public(folder: Path, *, seed: int = 0, per_class: int = 160) -> Path:
    """Write the public set: `<folder>/images/*.png` and `labels.csv` with columns file and label.

    `per_class` RGB PNGs of 72 x 72 pixels for each of `PUBLIC_CLASSES`, of neutral but widely
    varying acquisition. Returns `folder`. Raises `UsageError` for a negative seed.
    """
    rows = []
    for label, kind in PUBLIC_KINDS.items():
        for i in range(per_class):
            file = f"images/{label}_{i:04d}.png"
            rng = _rng(seed, f"public {label}", i)
            varied = _vary(_NEUTRAL, rng)
            blur, zoom, noise = rng.uniform((0.3, 0.8, 0.005), (1.3, 1.2, 0.045)).tolist()
            acquisition = replace(varied, blur=blur, magnification=zoom, noise=noise)
            _save(folder / file, kind, acquisition, rng)
            rows.append((file, label))
    _write_table(folder / "labels.csv", ("file", "label"), rows)
    return folder


def write_union(folder: Path, hospitals: Mapping[str, Path]) -> Path:
    """Write `<folder>/all.csv` (file, label, site, patient, split) and return its path.

    It holds the rows of every hospital, with files relative to `folder`, above all of them.
    """
    rows = []
    for site, root in hospitals.items():
        with (root / "labels.csv").open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                file = (root / row["file"]).relative_to(folder).as_posix()
                rows.append((file, row["label"], site, row["patient"], row["split"]))
    _write_table(folder / "all.csv", ("file", "label", "site", "patient", "split"), rows)
    return folder / "all.csv"


def _rng(seed: int, name: str, index: int = 0) -> Rng:
    if seed < 0:
        raise UsageError(f"The seed of the demo's images is {seed}: give one that is 0 or larger.")
    # A stream for each image, so that an image does not depend on how many came before it.
    return np.random.default_rng([seed, zlib.crc32(name.encode()), index])


def _save(path: Path, kind: CellKind, acquisition: Acquisition, rng: Rng) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _photograph(_draw_scene(kind, acquisition, rng), acquisition, rng).save(path, format="PNG")


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])


def _plan(name: str, hospital: Hospital, rng: Rng) -> list[tuple[str, str, str]]:
    """Label, patient (2 to 6 images each) and split of every image, in random order."""
    rows: list[tuple[str, str, str]] = []
    patients = 0
    for split, share in SPLITS.items():
        counts = [round(part * share * hospital.images) for part in hospital.mix]
        labels = list(rng.permutation(np.repeat(CLASSES, counts)).tolist())
        while labels:
            patients += 1
            size = int(rng.integers(2, 7))
            rows += [(label, f"{name}-p{patients:03d}", split) for label in labels[:size]]
            labels = labels[size:]
    return [rows[i] for i in rng.permutation(len(rows))]


def _vary(acquisition: Acquisition, rng: Rng) -> Acquisition:
    """The laboratory on another day: dyes, light and contrast drift by its `spread`."""
    spread = acquisition.spread

    def drift(colour: Colour, spread: float) -> Colour:
        log_gain = rng.normal(0, spread) + rng.normal(0, spread / 2, 3)
        return tuple((np.asarray(colour) * np.exp(log_gain)).tolist())

    return replace(
        acquisition,
        light=drift(acquisition.light, spread / 4),
        dyes=tuple(drift(dye, spread) for dye in acquisition.dyes),
        contrast=acquisition.contrast * float(np.exp(rng.normal(0, spread / 2))),
    )


def _draw_scene(kind: CellKind, acquisition: Acquisition, rng: Rng) -> Floats:
    """Densities of the nuclear, acid and basic dye: float32 (3, 72, 72)."""
    scale = acquisition.magnification
    background = _draw_background(acquisition, rng)
    radius = rng.uniform(*kind.radius) * scale
    centre = SIDE / 2 + rng.uniform(-6, 6, 2)
    turn = rng.uniform(0, 2 * np.pi)
    body = _draw_body(kind, radius, centre, turn, rng)
    nucleus = _draw_nuclei(kind, radius, centre, turn, rng) * body
    granules = _scatter(kind.granules, kind.granule_radius, 0.9 * radius, centre, scale, rng)
    granules *= body * (1 - 0.7 * nucleus)
    vacuoles = _scatter(kind.vacuoles, (1.2, 2.8), 0.85 * radius, centre, scale, rng)
    cytoplasm = body * (1 - nucleus) * (1 - 0.85 * vacuoles) * (1 + 0.15 * _cloud(12, rng))
    if kind.pallor:
        pale = _mask([_outline(centre, 0.55 * radius, 1.0, 0.0, rng)], blur=2.0)
        cytoplasm *= 1 - kind.pallor * pale
    chromatin = rng.uniform(0.8, 1.1) * (1 + 0.14 * _cloud(18, rng) + 0.08 * _cloud(9, rng))
    nuclear = nucleus * chromatin + granules * rng.uniform(*kind.granule_nuclear)
    acid = cytoplasm * rng.uniform(*kind.acid) + granules * rng.uniform(*kind.granule_acid)
    basic = cytoplasm * rng.uniform(*kind.basic)
    return np.asarray(background * (1 - body) + [nuclear, acid, basic], dtype=np.float32)


def _draw_background(acquisition: Acquisition, rng: Rng) -> Floats:
    """Red cells with a paler middle, and a few platelets: densities, float32 (3, 72, 72)."""
    scale = acquisition.magnification
    rims, middles = [], []
    for _ in range(rng.poisson(acquisition.red_cells)):
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(24, 50)
        centre = SIDE / 2 + distance * np.array([np.cos(angle), np.sin(angle)])
        radius = rng.uniform(9, 12) * scale
        elongation, turn = rng.uniform(1.0, 1.3), rng.uniform(0, np.pi)
        rims.append(_outline(centre, radius, elongation, turn, rng))
        middles.append(_outline(centre, 0.45 * radius, elongation, turn, rng))
    red = _mask(rims) * (1 - 0.6 * _mask(middles, blur=1.5)) * rng.uniform(0.45, 0.75)
    platelets = _scatter((0, 3), (1.0, 2.0), 45.0, np.full(2, SIDE / 2), scale, rng)
    plasma = np.clip(0.03 + 0.02 * _cloud(4, rng), 0, None)
    return np.stack([0.5 * platelets, red, 0.15 * red + plasma]).astype(np.float32)


def _draw_body(kind: CellKind, radius: float, centre: Points, turn: float, rng: Rng) -> Floats:
    if kind.bend is None:
        return _mask([_outline(centre, radius, rng.uniform(*kind.elongation), turn, rng)])
    bend = rng.uniform(*kind.bend)
    widths = rng.uniform(0.28, 0.42) * radius * np.sin(np.pi * np.linspace(0, 1, 40))
    return _mask(_chain(centre, radius * 1.8 / bend, bend, widths, turn))


def _draw_nuclei(kind: CellKind, radius: float, centre: Points, turn: float, rng: Rng) -> Floats:
    polygons: list[Points] = []
    for i in range(kind.nuclei):
        # Two nuclei lie along the body's long axis, one on each side of the middle.
        side = turn + np.pi * i + rng.normal(0, 0.3)
        shift = rng.uniform(*kind.offset) * radius * np.array([np.cos(side), np.sin(side)])
        width = rng.uniform(*kind.nucleus) * radius
        arc = rng.uniform(*kind.arc)
        if arc == 0:
            polygons.append(_outline(centre + shift, width, rng.uniform(1, 1.25), turn, rng))
            continue
        lobes = int(rng.integers(kind.lobes[0], kind.lobes[1] + 1))
        t = np.linspace(0, 1, 28)
        waist = 1 - rng.uniform(*kind.pinch) * (1 - np.abs(np.sin(np.pi * lobes * t)))
        widths = width * waist * (1 + 0.1 * rng.normal() * np.cos(np.pi * t))
        wave = 0.12 * rng.normal() * np.sin(rng.uniform(4, 8) * t + rng.uniform(0, 6))
        midline = kind.arc_radius * radius * (rng.uniform(0.9, 1.1) + wave)
        polygons += _chain(centre + shift, midline, arc, widths, rng.uniform(0, 2 * np.pi))
    return _mask(polygons)


def _scatter(
    count: tuple[int, int], size: Range, reach: float, centre: Points, scale: float, rng: Rng
) -> Floats:
    """The mask of small discs, uniformly over a circle of radius `reach`: float32 (72, 72)."""
    number = int(rng.integers(count[0], count[1] + 1))
    angle = rng.uniform(0, 2 * np.pi, number)
    distance = reach * np.sqrt(rng.uniform(0, 1, number))
    radii = rng.uniform(*size, number) * scale
    centres = centre + distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return _mask(_discs(centres, radii))


def _outline(centre: Points, radius: float, elongation: float, turn: float, rng: Rng) -> Points:
    """An ellipse whose border wavers a little: a polygon (40, 2)."""
    waver = np.ones_like(_ANGLES)
    for k in (2, 3, 4, 5):
        waver += rng.normal(0, 0.08 / k) * np.cos(k * _ANGLES + rng.uniform(0, 2 * np.pi))
    stretch = np.array([np.sqrt(elongation), 1 / np.sqrt(elongation)])
    cos, sin = np.cos(turn), np.sin(turn)
    points = radius * waver[:, None] * _CIRCLE * stretch
    return np.asarray(centre + points @ np.array([[cos, sin], [-sin, cos]]))


def _chain(
    centre: Points, midline: float | Points, arc: float, widths: Points, turn: float
) -> list[Points]:
    """Overlapping discs along an arc of `arc` radians, its centroid at `centre`."""
    angles = turn + arc * np.linspace(-0.5, 0.5, len(widths))
    points = np.stack([midline * np.cos(angles), midline * np.sin(angles)], axis=1)
    return _discs(points + (centre - points.mean(axis=0)), widths)


def _discs(centres: Points, radii: Points) -> list[Points]:
    return list(centres[:, None] + radii[:, None, None] * _CIRCLE[::4])


def _mask(polygons: Sequence[Points], *, blur: float = 0.0) -> Floats:
    """The union of polygons with smooth edges: coverage in 0..1, float32 (72, 72)."""
    canvas = Image.new("L", (SIDE * _OVERSAMPLING, SIDE * _OVERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        draw.polygon((polygon * _OVERSAMPLING).ravel().tolist(), fill=255)
    mask = canvas.reduce(_OVERSAMPLING).filter(ImageFilter.GaussianBlur(blur))
    return np.asarray(np.asarray(mask) / 255, dtype=np.float32)


def _cloud(cells: int, rng: Rng) -> Floats:
    """Smooth noise with `cells` bumps across the image, mean near 0: float32 (72, 72)."""
    coarse = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)


def _photograph(densities: Floats, acquisition: Acquisition, rng: Rng) -> Image.Image:
    optical_density = densities.transpose(1, 2, 0) @ np.array(acquisition.dyes, dtype=np.float32)
    seen = np.asarray(acquisition.light, dtype=np.float32) * np.exp(-optical_density)
    seen = 0.5 + (seen - 0.5) * acquisition.contrast
    side = rng.uniform(0, 2 * np.pi)
    shade = 0.6 * (np.cos(side) * _X + np.sin(side) * _Y) - 0.5 * (_X**2 + _Y**2)
    seen *= (1 + acquisition.gradient * shade)[..., None]
    blur = ImageFilter.GaussianBlur(acquisition.blur * float(np.exp(rng.normal(0, 0.25))))
    noise = rng.normal(0, acquisition.noise, seen.shape)
    return _to_image(np.asarray(_to_image(seen).filter(blur)) / 255 + noise)


def _to_image(values: npt.NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.clip(np.round(values * 255), 0, 255).astype(np.uint8))
