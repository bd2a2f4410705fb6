"""`--format adapter`: only the gates, for PEFT."""

from pathlib import Path

from retrofit.export.checkpoint_format import LOAD_CODE, CheckpointFormat
from retrofit.models.source import MergeSource
from retrofit.utils.errors import UserError
from retrofit.utils.files import copy, read_json, write_json


class Adapter(CheckpointFormat):
    """Only the gates, as they were trained."""

    name = "adapter"
    engines = ("transformers",)
    library = "peft"
    options = ("--import-retrofit",)
    is_model = False

    def dtype(self, source, asked):
        if asked not in (None, "float32"):
            raise UserError(f"an adapter is kept in float32, as it was trained, not in {asked}")
        return "float32"

    def write(self, source: MergeSource, folder: Path, dtype, max_shard_size, name):
        config_file, weights_file = "adapter_config.json", "adapter_model.safetensors"
        copy(source.adapter, folder, config_file, weights_file)
        # PEFT does not expand `~`, so the path of a local base is written out.
        base = str(source.base.resolve()) if source.base_is_local else source.base_name
        config = read_json(folder / config_file) | {"base_model_name_or_path": base}
        write_json(folder / config_file, config)
        return {
            "model_type": source.config.model_type,
            "constant_heads": 0,
            "bytes": (folder / weights_file).stat().st_size,
            "parameters": source.gates.parameters,
        }

    def matches(self, folder, config, file):
        return not config and (folder / "adapter_config.json").is_file()

    def how_to_load(self, report, name):
        imports = (
            "import retrofit  # registers the gates with PEFT; installed from its repository\n"
        )
        return LOAD_CODE.format(name=name, imports=imports, options="")


FORMAT = Adapter()
