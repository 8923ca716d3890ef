"""Writes the files that the benchmarks merge: a base, task vectors, and the fine-tuned models.

Names and shapes are those of timm's vision transformers without a head; width 768 and depth 12 are
ViT-B/16, 86 million values, width 384 is ViT-S/16 with 22 million.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

BASE = "base"
VECTORS, CHECKPOINTS = "vectors", "checkpoints"


def shapes(width: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a vision transformer."""
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            found[f"blocks.{block}.{name}.weight"] = (rows, columns)
            found[f"blocks.{block}.{name}.bias"] = (rows,)
        for norm in ("norm1", "norm2"):
            found[f"blocks.{block}.{norm}.weight"] = (width,)
            found[f"blocks.{block}.{norm}.bias"] = (width,)
    return found


def values(width: int, depth: int) -> int:
    """Number of values of one model."""
    return sum(math.prod(shape) for shape in shapes(width, depth).values())


def vector(folder: Path, index: int) -> Path:
    """A site's task vector; sites count from 0."""
    return folder / f"vector{index}.safetensors"


def model(folder: Path, name: str | int) -> Path:
    """The weights of the base, or of a site's fine-tuned model, in a folder of their own."""
    return folder / (name if isinstance(name, str) else f"site{name}") / "model.safetensors"


def make(folder: Path, sites: int, width: int, depth: int, kinds: list[str]) -> None:
    """Write what is not there yet."""
    import torch

    from merge_kit.tensorfile import TensorFile, TensorWriter
    from merge_kit.tensorheader import TensorSpec

    specs = {n: TensorSpec(torch.float32, s) for n, s in shapes(width, depth).items()}

    def write(path: Path, seed: int, scale: float, start: Path | None = None) -> None:
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        with TensorWriter(path, specs) as writer:
            for name, spec in specs.items():
                tensor = torch.randn(spec.shape, generator=generator) * scale
                if start:
                    with TensorFile(start) as base:
                        tensor += base.read(name)
                writer.write(name, tensor)
        if path.name == "model.safetensors":
            config = {
                "architecture": "vit_base_patch16_224",
                "num_classes": 0,
                "model_args": {
                    "embed_dim": width,
                    "depth": depth,
                    "num_heads": max(1, width // 64),
                },
            }
            (path.parent / "config.json").write_text(json.dumps(config))

    base = model(folder, BASE)
    write(base, 0, 0.05)
    for index in range(sites):
        if VECTORS in kinds:
            write(vector(folder, index), index + 1, 0.01)
        if CHECKPOINTS in kinds:
            write(model(folder, index), index + 1, 0.01, base)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("kinds", nargs="+", choices=[VECTORS, CHECKPOINTS])
    chosen = parser.parse_args()
    make(chosen.folder, chosen.sites, chosen.width, chosen.depth, chosen.kinds)


if __name__ == "__main__":
    main()
