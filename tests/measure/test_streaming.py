"""Streaming: one pass with a band for a mask reads as token by token through an evicting cache."""

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from retrofit import GateConfig
from retrofit.measure import measure
from retrofit.measure.streaming import Streaming
from retrofit.utils.errors import UserError

CACHE, SINKS, LENGTH = 24, 4, 320


class SinkLayer(DynamicLayer):
    """StreamingLLM's cache, token by token: the oldest but the first `SINKS` go, and the others
    move up by one position."""

    def __init__(self, rotary):
        super().__init__()
        self.rotary = rotary

    def update(self, key_states, value_states, *args, **kwargs):
        if self.is_initialized and self.keys.shape[2] == CACHE:
            cos, sin = self.rotary(key_states, torch.tensor([[-1]]))
            turned, rest = self.keys[..., : cos.shape[-1]], self.keys[..., cos.shape[-1] :]
            left, right = turned.chunk(2, -1)
            moved = torch.cat([turned * cos + torch.cat([-right, left], -1) * sin, rest], -1)
            self.keys = torch.cat([self.keys[:, :, :SINKS], moved[:, :, SINKS + 1 :]], 2)
            self.values = torch.cat([self.values[:, :, :SINKS], self.values[:, :, SINKS + 1 :]], 2)
        return super().update(key_states, value_states)


def token_by_token(model, input_ids: torch.Tensor, layer, last_position: int) -> torch.Tensor:
    """Negative log-likelihoods `[T - 1]`."""
    cache = Cache(layers=[layer() for _ in model.model.layers])
    nll = []
    for position in range(len(input_ids) - 1):
        with torch.no_grad():
            logits = model(
                input_ids[None, position : position + 1],
                past_key_values=cache,
                position_ids=torch.tensor([[min(position, last_position)]]),
            ).logits
        nll.append(-logits[0, -1].double().log_softmax(-1)[input_ids[position + 1]])
    return torch.stack(nll)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(bytes(97 + (i * i * 7 + i) % 26 for i in range(LENGTH)).decode())
    return path


def opened(model):
    return lambda source, dtype: (model, tiny_tokenizer())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_5_text"])
def test_one_pass_equals_token_by_token(family, gated, text):
    overrides = {"layer_types": ["full_attention"] * 3} if family == "qwen3_5_text" else {}
    if gated and overrides:
        pytest.skip("a merged checkpoint has its gates inside")
    model = tiny_model(family, **overrides).eval()
    inner = model
    if gated:
        config = GateConfig(init_weights=False, granularity="elementwise")
        model = get_peft_model(model, config).eval()
        inner = model.get_base_model()
    part = Streaming(cache=CACHE, sinks=SINKS, length=LENGTH, windows=1)
    result = measure(
        ["a"], text, length=192, windows=1, evaluations=[part], load=opened(model), progress=False
    )
    found = result["models"][0]["streaming"]
    input_ids = torch.tensor(tiny_tokenizer()(text.read_text())["input_ids"])
    rotary = inner.model.rotary_emb
    expected = {
        "full": token_by_token(inner, input_ids, DynamicLayer, LENGTH),
        "window": token_by_token(
            inner, input_ids, lambda: DynamicSlidingWindowLayer(CACHE), LENGTH
        ),
        "kept_sinks": token_by_token(inner, input_ids, lambda: SinkLayer(rotary), CACHE - 1),
    }
    for kind, nll in expected.items():
        evicted = nll[CACHE - 1 :]
        assert found["nll_by_window"][kind] == pytest.approx([evicted.mean().item()], rel=1e-5)
        assert found["perplexity"][kind] == pytest.approx(evicted.mean().exp().item(), rel=1e-5)
        bins = [each.mean().exp().item() for each in nll.tensor_split(16)]
        assert found["by_position"][kind] == pytest.approx(bins, rel=1e-4)
    figures = found["nll_by_window"]
    assert len({round(each[0], 6) for each in figures.values()}) == 3, "the caches must differ"
    assert inner.config._attn_implementation == "sdpa"


def test_a_cache_longer_than_the_text_is_refused_before_any_work():
    with pytest.raises(UserError, match="must grow in this order"):
        Streaming(cache=400, length=LENGTH)


def test_a_sliding_window_is_refused(text):
    model = tiny_model("mistral", sliding_window=16)
    part = Streaming(cache=CACHE, length=LENGTH)
    with pytest.raises(UserError, match="slides by itself"):
        measure(["a"], text, length=192, evaluations=[part], load=opened(model), progress=False)
