"""What a merge asks of every format of checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retrofit.models.source import MergeSource
from retrofit.utils.dtypes import dtype_name
from retrofit.utils.errors import CheckError, UserError

LOAD = """\
```python
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto"{options})
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""
TRUST = ", trust_remote_code=True"


class MergeMismatchError(CheckError):
    """The written checkpoint does not compute what was trained. Nothing is left on disk."""


class CheckpointFormat:
    """A form in which base and gates are written. Each subclass has one instance, `FORMAT` in its
    module, which `retrofit.export.registry` finds by its name.

    Attributes:
        name: on the command line and in `retrofit-merge.json`.
        engines: that read it. A checkpoint is proved in the first one before it appears.
        dtypes: that its weights can be stored in.
        rounds_inputs: whether the first engine rounds what it multiplies weights by to their dtype.
        library: what loads it, by the hub's name.
        options: of the script that proves it in an engine.
        has_tokenizer_files: whether the tokenizer lies beside the weights, in files of its own.
        is_model: whether it holds a whole model. One with tokenizer files has a
            `generation_config.json` as well.
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
        """
        Raises:
            UserError: if a library is missing that writes or proves it.
        """

    def dtype(self, source: MergeSource, asked: str | None) -> str:
        """What weights are stored in: as asked, or as the base's are.

        Raises:
            UserError: if it cannot hold weights of that dtype.
        """
        output = source.weights["model.layers.0.self_attn.o_proj.weight"]
        name = asked or dtype_name(output.dtype)
        if name not in self.dtypes:
            raise UserError(
                f"cannot store weights as {name}; dtype must be {', '.join(self.dtypes)}"
            )
        return name

    def refusal(self, source: MergeSource) -> str | None:
        """Why base and gates have no place in it, or `None` if they have one."""
        return None

    def check(self, source: MergeSource) -> None:
        """Look at once at what would fail only after the work.

        Raises:
            UserError: if the base has what the format cannot hold.
        """

    def write(
        self, source: MergeSource, folder: Path, dtype: str, max_shard_size: int, name: str
    ) -> dict[str, Any]:
        """Write base and gates, which `refusal` has passed, into an empty folder.

        Args:
            dtype: of the stored weights.
            max_shard_size: bytes of one file.
            name: that the folder will have.

        Returns:
            What `retrofit-merge.json` says of the checkpoint beside its format and dtype: `bytes`,
            `parameters`, `model_type`, and what the format's own section of the card needs.
        """
        raise NotImplementedError

    def lies_in(self, folder: Path, config: dict[str, Any], file: str | None) -> bool:
        """Whether a folder holds this format.

        Args:
            config: its `config.json`, empty if there is none.
            file: the GGUF file that its report names.
        """
        raise NotImplementedError

    def check_code(self, folder: Path, model_type: str) -> None:
        """
        Args:
            model_type: of the base.

        Raises:
            MergeMismatchError: if the folder holds code that would run and is not ours.
        """

    @contextmanager
    def loadable(self, folder: Path, file: str | None) -> Iterator[Path]:
        """What an engine is given to load."""
        yield folder

    def how_to_load(self, report: dict[str, Any], name: str) -> str:
        """The section of the model card, in Markdown.

        Args:
            report: `retrofit-merge.json`.
            name: what it is loaded by.
        """
        raise NotImplementedError
