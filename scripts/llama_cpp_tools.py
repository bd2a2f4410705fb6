"""Build llama.cpp's own `llama-quantize` and `llama-perplexity`, which no package has as binaries.

    python scripts/llama_cpp_tools.py FOLDER

The source is llama.cpp as the pinned sdist of llama-cpp-python carries it. It needs cmake and a C++
compiler, and ten minutes on two cores.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from registry import AssetError, pip, say

PACKAGE, SHA256 = (
    "llama-cpp-python==0.3.36",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
)
TOOLS = ("llama-quantize", "llama-perplexity")
LEFT_OUT = ("TESTS", "EXAMPLES", "SERVER")


def main() -> int:
    try:
        build(Path(sys.argv[1]))
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build(folder: Path) -> None:
    """Build the tools that are missing in a folder.

    Raises:
        AssetError: if there is no cmake, or the source is not the pinned one.
    """
    if all((folder / tool).is_file() for tool in TOOLS):
        return
    if not shutil.which("cmake"):
        raise AssetError("llama.cpp is built with cmake, which is not installed: pip install cmake")
    with TemporaryDirectory() as temporary:
        source, made = download(Path(temporary)), Path(temporary) / "build"
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF"]
        options += [f"-DLLAMA_BUILD_{part}=OFF" for part in LEFT_OUT]
        subprocess.run(["cmake", "-S", source, "-B", made, *options], check=True)
        subprocess.run(["cmake", "--build", made, "--parallel", "--target", *TOOLS], check=True)
        folder.mkdir(parents=True, exist_ok=True)
        for tool in TOOLS:
            shutil.copy2(made / "bin" / tool, folder)


def download(folder: Path) -> Path:
    """Download and unpack the sdist, and return the folder of llama.cpp's source in it."""
    say(f"downloading {PACKAGE}")
    pip("download", PACKAGE, "--no-binary", ":all:", "-d", str(folder))
    (archive,) = folder.iterdir()
    if (digest := hashlib.sha256(archive.read_bytes()).hexdigest()) != SHA256:
        raise AssetError(f"{PACKAGE} has sha256 {digest} where {SHA256} was expected")
    with tarfile.open(archive) as tarball:
        tarball.extractall(folder, filter="data")
    (source,) = folder.glob("*/vendor/llama.cpp")
    return source


if __name__ == "__main__":
    sys.exit(main())
