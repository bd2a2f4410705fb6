"""Fixtures: tiny random models of every family, and small local text."""

import os

# Two spinning thread pools on two cores collapse; one thread is fastest for tiny models.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from tiny import FAMILIES, tiny_model, tiny_tokenizer


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(params=["headwise", "elementwise"])
def granularity(request) -> str:
    return request.param


@pytest.fixture
def in_process(monkeypatch):
    """Verify merges without a process for each, which takes seconds."""
    import llama_server
    import stock_transformers

    from retrofit.export.verify import verify

    def check(script, paths, options, _python):
        if script == "llama_server.py":
            return llama_server.check(*paths)
        return stock_transformers.check(*paths, trust_remote_code="--trust-remote-code" in options)

    monkeypatch.setattr(verify, "_run", check)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """`tiny_base("llama")` is a folder with a tiny model and a tokenizer, built once."""
    folders = {}

    def build(model_type: str, **overrides):
        key = (model_type, *sorted(overrides.items()))
        if key not in folders:
            folder = tmp_path_factory.mktemp(f"tiny-{model_type}")
            tiny_model(model_type, **overrides).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            folders[key] = folder
        return folders[key]

    return build
