"""`--format gguf`: one file for llama.cpp.

The module that writes it, `llama_cpp`, is imported late, because it needs optional libraries.
"""

from contextlib import contextmanager
from importlib.util import find_spec

from retrofit.export.checkpoint_format import CheckpointFormat
from retrofit.utils.errors import UserError


class Gguf(CheckpointFormat):
    """One GGUF file for llama.cpp."""

    name = "gguf"
    engines = ("llama.cpp",)
    dtypes = (*CheckpointFormat.dtypes, "q8_0")
    rounds_inputs = True
    library = "gguf"
    has_tokenizer_files = False

    def check_installed(self):
        if not all(find_spec(name) for name in ("gguf", "xllamacpp")):
            raise UserError(
                "a GGUF file is written by gguf, and compared with the trained model in llama.cpp "
                "before it appears: pip install gguf xllamacpp"
            )

    def refusal(self, source):
        from retrofit.export import llama_cpp  # needs the extra `gguf`

        return llama_cpp.refusal(source)

    def check(self, source):
        from retrofit.export import llama_cpp

        llama_cpp.check_tokenizer(source)

    def write(self, source, folder, dtype, max_shard_size, name):
        from retrofit.export import llama_cpp

        file = folder / f"{name}-{llama_cpp.KINDS[dtype][0].name}.gguf"
        return {"file": file.name} | llama_cpp.write_gguf(source, file, dtype)

    def matches(self, folder, config, file):
        return file is not None and (folder / file).is_file()

    @contextmanager
    def loadable(self, folder, file):
        yield folder / file

    def how_to_load(self, report, name):
        return (
            "In llama.cpp (build 11434 or newer) and what is made of it:\n\n"
            f"```bash\nllama-server -m {report['checkpoint']['file']}\n```"
        )


FORMAT = Gguf()
