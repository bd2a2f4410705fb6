"""The plugin for vLLM: registered cheaply and in an environment that lacks most of what retrofit
needs, and as right as the trained model."""

import json
import os
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import family_table
import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from retrofit import GateConfig
from retrofit.export.merge import merge
from retrofit.vllm_plugin.configs import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
SERVED = [name for name, (family, _) in family_table.FAMILIES.items() if family != "gpt_oss"]
# A vLLM that remembers what it is told, in an environment that has transformers and nothing else.
REGISTER = """
import json, sys, types

models = {}
registry = types.SimpleNamespace(register_model=models.__setitem__)
sys.modules["vllm"] = types.SimpleNamespace(ModelRegistry=registry)
for name in ("wrapt", "peft", "trl", "datasets", "accelerate", "typer", "pydantic"):
    sys.modules[name] = None

from retrofit.vllm_plugin import register

register()
register()  # vLLM may do so
from transformers import AutoConfig

config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=False)
ours = sorted(name for name in sys.modules if name.startswith("retrofit"))
print(json.dumps([models, ours, config.architectures, config.gated_layers]))
"""

# A vLLM of classes that do nothing but take weights and say which.
LOAD = """
import importlib.abc, importlib.machinery, json, sys, types
from torch import nn

class Module(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        load_weights = lambda self, weights: [stored for stored, _ in weights]
        return type(name, (nn.Module,), {"load_weights": load_weights})

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "vllm":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Module(spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Finder())
from retrofit.vllm_plugin.models import GatedQwen3ForCausalLM as Gated

print(json.dumps(Gated.load_weights(object.__new__(Gated), [(name, 0) for name in sys.argv[1:]])))
"""


@pytest.fixture
def checkpoint(tiny_base, tmp_path, in_process) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_base("qwen3"))
    gates = GateConfig(
        sinks="constant", layers_to_transform=[0, 2], init_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(model, gates).save_pretrained(str(tmp_path / "adapter"))
    merge(tmp_path / "adapter", tmp_path / "out", format="remote-code")
    return tmp_path / "out"


def test_registering_needs_transformers_alone_and_knows_the_checkpoint(checkpoint):
    command = [sys.executable, "-c", REGISTER, str(checkpoint)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    models, ours, architectures, layers = json.loads(run.stdout.splitlines()[-1])
    assert ours == ["retrofit", "retrofit.vllm_plugin", "retrofit.vllm_plugin.configs"]
    assert architectures == ["GatedQwen3ForCausalLM"] and layers == [0, 2]
    source = (ROOT / "retrofit/vllm_plugin/models.py").read_text()
    for name, where in models.items():
        assert where == f"retrofit.vllm_plugin.models:{name}" and f"class {name}(" in source
    assert len(models) == len(CONFIGS)


def test_weights_of_a_gate_are_taken_under_its_former_name_too():
    names = [
        f"model.layers.0.self_attn.{name}"
        for name in ("g1.g_proj.weight", "attn_gate.sinks", "q_proj.weight")
    ]
    run = subprocess.run([sys.executable, "-c", LOAD, *names], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [
        f"model.layers.0.self_attn.{name}"
        for name in ("attn_gate.g_proj.weight", "attn_gate.sinks", "q_proj.weight")
    ]


def test_vllm_finds_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plugins = project["entry-points"]["vllm.general_plugins"]
    assert plugins == {"retrofit": "retrofit.vllm_plugin:register"}


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_travel_between_processes(config):
    there = pickle.loads(pickle.dumps(config(gated_layers=[1], gate_sinks="constant")))
    assert type(there) is config and there.gated_layers == [1]
    assert there.gate_sinks == "constant" and there.architectures == [config.architecture]


def test_sinks_that_read_the_input_are_refused():
    with pytest.raises(NotImplementedError, match="sinks='input' do not run in vLLM"):
        CONFIGS[0](gate_sinks="input")
    chunks = {"chunk_size": 8}
    with pytest.raises(NotImplementedError, match="no dual chunk attention with sinks"):
        CONFIGS[3](gate_sinks="constant", dual_chunk_attention_config=chunks)
    assert CONFIGS[3](dual_chunk_attention_config=chunks).gate_sinks == "none"


@pytest.fixture(scope="module")
def vllm(tmp_path_factory) -> str:
    """A Python whose vLLM has the plugin, and of what retrofit needs no more than vLLM has."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    subprocess.run([*pip, "--no-deps", "--target", str(site), str(ROOT)], check=True)
    python = site / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {os.environ["RETROFIT_VLLM"]} "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.mark.engines
@pytest.mark.parametrize("name", SERVED)
def test_vllm_says_what_the_trained_model_says(name, vllm):
    cells = family_table.cells_of_plugin(name, vllm)
    print(name, cells)
    assert all(float(cell) < 1e-4 for cell in cells.values()), cells
