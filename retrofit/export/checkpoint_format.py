"""The interface of the checkpoint formats that a merge can write."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retrofit.models.source import MergeSource
from retrofit.utils.dtypes import dtype_name
from retrofit.utils.errors import CheckError, UserError

LOAD_CODE = """\
```python
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto"{options})
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""
TRUST_OPTION = ", trust_remote_code=True"


class MergeMismatchError(CheckError):
    """The written checkpoint does not compute what was trained, and is removed from the disk."""


class CheckpointFormat:
    """A format in which a merge writes the base and the gates.

    Each subclass has one instance, `FORMAT` in its module, which `retrofit.export.registry` finds
    by the name of the format.

    Attributes:
        name: its name on the command line and in `retrofit-merge.json`.
        engines: the engines that read it. The first one proves a checkpoint before it appears.
        dtypes: the dtypes that it can store weights in.
        rounds_inputs: whether the first engine also rounds the inputs of matrix products to the
            dtype of the weights.
        library: the library that loads it, by the hub's name.
        options: the options of the script that proves it in an engine.
        has_tokenizer_files: whether the tokenizer has files of its own beside the weights.
        is_model: whether it holds a whole model. A whole model with tokenizer files also has a
            `generation_config.json`.
    """

    name: str
    engines: tuple[str, ...] = ("transformers", "vllm")
    dtypes: tuple[str, ...] = ("bfloat16", "float32", "float16")
    rounds_inputs = False
    library = "transformers"
    options: tuple[str, ...] = ()
    has_tokenizer_files = True
    is_model = True

    def check_installed(self) -> None:
        """Checks the libraries that write and prove this format.

        Raises:
            UserError: if one of them is not installed.
        """

    def dtype(self, source: MergeSource, asked: str | None) -> str:
        """Returns the dtype to store weights in: the one asked for, else that of the base.

        Raises:
            UserError: if the format cannot store weights in that dtype.
        """
        o_proj = source.weights["model.layers.0.self_attn.o_proj.weight"]
        name = asked or dtype_name(o_proj.dtype)
        if name not in self.dtypes:
            raise UserError(
                f"cannot store weights as {name}; dtype must be {', '.join(self.dtypes)}"
            )
        return name

    def refusal(self, source: MergeSource) -> str | None:
        """Returns why this format cannot hold the base and the gates, or `None` if it can."""
        return None

    def check(self, source: MergeSource) -> None:
        """Checks early what would otherwise fail only after the work.

        Raises:
            UserError: if a part of the base cannot be written in this format.
        """

    def write(
        self, source: MergeSource, folder: Path, dtype: str, max_shard_size: int, name: str
    ) -> dict[str, Any]:
        """Writes the base and the gates into an empty folder, if `refusal` returned `None`.

        Args:
            source: the base and the gates.
            folder: the empty folder to write into.
            dtype: the dtype of the stored weights.
            max_shard_size: the largest size of a file, in bytes.
            name: the name that the folder will have.

        Returns:
            The entries of `checkpoint` in `retrofit-merge.json` beside its format and dtype:
            `bytes`, `parameters`, `model_type`, and those that `how_to_load` needs.
        """
        raise NotImplementedError

    def matches(self, folder: Path, config: dict[str, Any], file: str | None) -> bool:
        """Tells whether a folder holds a checkpoint in this format.

        Args:
            folder: the folder.
            config: the folder's `config.json`, empty if it has none.
            file: the name of the GGUF file in the folder's report, if it has one.
        """
        raise NotImplementedError

    def check_code(self, folder: Path, model_type: str) -> None:
        """Checks the code that loading a checkpoint would run.

        Args:
            folder: the folder of the checkpoint.
            model_type: the `model_type` of the base.

        Raises:
            MergeMismatchError: if the folder holds code that a merge did not write.
        """

    @contextmanager
    def loadable(self, folder: Path, file: str | None) -> Iterator[Path]:
        """Yields the path that an engine can load."""
        yield folder

    def how_to_load(self, report: dict[str, Any], name: str) -> str:
        """Returns the section of the model card on loading the checkpoint, in Markdown.

        Args:
            report: the contents of `retrofit-merge.json`.
            name: the path or hub id of the checkpoint.
        """
        raise NotImplementedError
