"""What the tests' Hugging Face Hub keeps: repositories with their commits, in memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml
from starlette.responses import JSONResponse

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs -text\n"


@dataclass(frozen=True)
class Blob:
    """A file's bytes; `sha256` where it is kept in the large file storage."""

    data: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        kept = self.data
        if self.sha256:
            kept = (
                "version https://git-lfs.github.com/spec/v1\n"
                f"oid sha256:{self.sha256}\nsize {len(self.data)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()


@dataclass(frozen=True)
class Commit:
    parent: str | None
    title: str
    author: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    name: str
    private: bool
    writers: set[str]
    readers: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[dict[str, object]] = field(default_factory=list)

    def add(self, ref: str, files: Mapping[str, Blob], title: str, author: str) -> str:
        parent = self.refs.get(ref)
        oid = hashlib.sha1(f"{self.name} {ref} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(parent, title, author, files)
        self.refs[ref] = oid
        return oid

    def files(self, revision: str = "main") -> Mapping[str, Blob]:
        return self.commits[self.refs.get(revision, revision)].files

    @property
    def card(self) -> dict[str, object]:
        text = self.files().get("README.md", Blob(b"")).data.decode()
        found = re.match(r"---\n(.*?)\n---", text, re.S)
        return (yaml.safe_load(found[1]) if found else None) or {}

    @property
    def tags(self) -> list[str]:
        card = self.card
        bases = card.get("base_model") or []
        bases = [bases] if isinstance(bases, str) else bases
        relation = card.get("base_model_relation")
        return [
            *card.get("tags", []),
            *(str(card[key]) for key in ("library_name", "pipeline_tag") if key in card),
            *(f"base_model:{base}" for base in bases),
            *(f"base_model:{relation}:{base}" for base in bases if relation),
        ]


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        self.response = JSONResponse(
            {"error": message},
            status,
            {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers},
        )
