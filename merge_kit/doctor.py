"""What this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

OWN_PACKAGES = ("merge_kit", "finetune", "evaluate")
LIBRARIES = ("torch", "torchvision", "timm", "safetensors", "huggingface_hub", "scikit-learn")
EXTRAS = {
    "dicom": ("pydicom", "pylibjpeg"),
}
_LOW_MEMORY_GIB = 4
_LOW_DISK_GIB = 5


class Level(Enum):
    """How much a finding matters."""

    GOOD = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about this machine, and the remedy where one is needed."""

    level: Level
    subject: str
    text: str
    remedy: str = ""


def examine(folder: Path) -> list[Finding]:
    """All findings; `folder` is where work would be written."""
    return [
        *_versions(),
        *_shadows(),
        *_devices(),
        _memory(),
        _disk(folder),
        *_extras(),
        _network(),
    ]


def _versions() -> Iterator[Finding]:
    version = platform.python_version()
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        yield Finding(Level.GOOD, "python", version)
    else:
        remedy = "use Python 3.10 to 3.13"
        yield Finding(Level.NOTE, "python", f"{version}, which is not tested", remedy)
    yield Finding(Level.GOOD, "merge-kit", importlib.metadata.version("merge-kit"))
    for name in LIBRARIES:
        yield _library(name)


def _library(name: str) -> Finding:
    module = {"scikit-learn": "sklearn"}.get(name, name)
    try:
        version = importlib.metadata.version(name)
        importlib.import_module(module)
    except importlib.metadata.PackageNotFoundError:
        return Finding(Level.PROBLEM, name, "is not installed", "pip install merge-kit")
    except Exception as error:  # whatever a broken installation raises at import is the finding
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = f"pip install --force-reinstall {name}"
        if name in ("torchvision", "timm"):
            remedy = "install torch and torchvision of matching releases: pip install -U both"
        return Finding(Level.PROBLEM, name, f"{version} cannot be imported: {first}", remedy)
    return Finding(Level.GOOD, name, version)


def _shadows() -> Iterator[Finding]:
    owners = importlib.metadata.packages_distributions()
    for package in OWN_PACKAGES:
        others = sorted(set(owners.get(package, [])) - {"merge-kit"})
        spec = importlib.util.find_spec(package)
        place = str(Path(spec.origin).parent) if spec and spec.origin else "nowhere"
        ours = spec is not None and spec.origin is not None and _is_ours(package, spec.origin)
        if not ours:
            culprit = others[0] if others else place
            yield Finding(
                Level.PROBLEM,
                f"package {package}",
                f"another '{package}' hides ours ({culprit})",
                f"use an environment of its own, or pip uninstall {culprit}",
            )
        elif others:
            yield Finding(
                Level.NOTE,
                f"package {package}",
                f"'{others[0]}' installs a package of this name too; ours is found first",
                "use an environment of its own for merge-kit",
            )
        else:
            yield Finding(Level.GOOD, f"package {package}", "is ours")


def _is_ours(package: str, origin: str) -> bool:
    # All three lie side by side, in a checkout as in site-packages, and only ours carry a marker.
    marker = {"merge_kit": "cli.py", "finetune": "training.py", "evaluate": "verdict.py"}
    return (Path(origin).parent / marker[package]).is_file()


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except Exception:  # already a finding of its own
        return
    yield Finding(Level.GOOD, "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            bf16 = (
                "bfloat16"
                if torch.cuda.is_bf16_supported(including_emulation=False)
                else "no bfloat16"
            )
            yield Finding(
                Level.GOOD, f"cuda:{index}", f"{properties.name}, {memory:.0f} GiB, {bf16}"
            )
    elif torch.backends.mps.is_available():
        yield Finding(Level.GOOD, "mps", "Apple GPU")
    else:
        yield Finding(
            Level.NOTE,
            "gpu",
            "none that torch can use",
            "training works on the CPU, slowly; with an NVIDIA GPU check its driver (nvidia-smi)",
        )


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return Finding(Level.NOTE, "memory", "cannot be told on this system")
    if total < _LOW_MEMORY_GIB:
        remedy = "use a small backbone and --batch-size 8"
        return Finding(Level.NOTE, "memory", f"{total:.1f} GiB", remedy)
    return Finding(Level.GOOD, "memory", f"{total:.1f} GiB")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 2**30
    if free < _LOW_DISK_GIB:
        remedy = "make room: decoded images and checkpoints are kept in the site's folder"
        return Finding(Level.NOTE, "disk", f"{free:.1f} GiB free in {folder}", remedy)
    return Finding(Level.GOOD, "disk", f"{free:.0f} GiB free in {folder}")


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            remedy = f"pip install 'merge-kit[{extra}]' if you need it"
            text = f"not installed ({', '.join(missing)})"
            yield Finding(Level.NOTE, f"extra {extra}", text, remedy)
        else:
            yield Finding(Level.GOOD, f"extra {extra}", "installed")


def _network() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Finding(
            Level.NOTE,
            "hugging face",
            "HF_HUB_OFFLINE is set: 'init' cannot download weights, and hubs hf:// are not asked",
            "give a local file with --weights, or unset it",
        )
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    endpoint = re.sub(r"://[^/@]+@", "://", endpoint)  # a password is nobody's business
    return Finding(
        Level.GOOD, "hugging face", f"{endpoint} (asked by 'init', 'push' and hubs hf://)"
    )
