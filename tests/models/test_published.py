"""Models published with gates are measured as they lie: their gate scores against the formulas of
their own code, on tiny random checkpoints."""

import tempfile
from pathlib import Path

import pytest
import torch
from published_layout import GROUPS, HEAD_DIM, HEADS, INPUT_IDS, KV_HEADS, published
from safetensors.torch import load_file
from tiny import SHAPE, tiny_model, tiny_tokenizer
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen3_5Config

from retrofit.measure import measure
from retrofit.models.loading import load_model

HYBRID = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
STOCK = {
    "Qwen3NextAttention": ("qwen3_next", HYBRID | EXPERTS),
    "Qwen3_5Attention": ("qwen3_5_text", HYBRID),
    "Qwen3_5MoeAttention": ("qwen3_5_moe_text", HYBRID | EXPERTS),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(bytes(97 + (i * i // 7) % 26 for i in range(384)).decode())
    return path


def save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def measured(source: Path, text: Path) -> dict:
    (model,) = measure([str(source)], text, length=192, windows=2, progress=False)["models"]
    return model


def windows(text: Path) -> torch.Tensor:
    """What `measure` reads with the byte-level tokenizer: two windows of 192 tokens."""
    return tiny_tokenizer()(text.read_text(), return_tensors="pt")["input_ids"].view(2, 192)


@torch.no_grad()
def seen(model, input_ids: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the attention of a layer reads, `[batch, T, hidden_size]`, and what it passes on to its
    `o_proj`, `[batch, T, heads, head_dim]`."""
    attention, found = model.get_decoder().layers[index].self_attn, {}
    handles = [
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: found.update(read=kwargs["hidden_states"]), with_kwargs=True
        ),
        attention.o_proj.register_forward_pre_hook(lambda _, args: found.update(out=args[0])),
    ]
    model(input_ids)
    for handle in handles:
        handle.remove()
    return found["read"], found["out"].unflatten(-1, (HEADS, HEAD_DIM))


def gate_rows(head: int) -> slice:
    """Of a stock `q_proj`: for each head first its query's rows, then its gate's."""
    return slice((2 * head + 1) * HEAD_DIM, (2 * head + 2) * HEAD_DIM)


def naive_scores(model, input_ids: torch.Tensor, index: int) -> torch.Tensor:
    """`sigmoid(X W_g)` of one layer, `[batch, T, heads, head_dim]`."""
    hidden_states, _ = seen(model, input_ids, index)
    weight = model.get_decoder().layers[index].self_attn.q_proj.weight.detach()
    each = [torch.sigmoid(hidden_states @ weight[gate_rows(head)].T) for head in range(HEADS)]
    return torch.stack(each, dim=-2)


@pytest.fixture(params=STOCK.values(), ids=STOCK)
def hybrid(request):
    model_type, overrides = request.param
    return tiny_model(model_type, **overrides)


def test_the_naive_scores_are_what_a_hybrid_model_multiplies_with(hybrid):
    scores = naive_scores(hybrid, INPUT_IDS, 3)
    _, gated = seen(hybrid, INPUT_IDS, 3)
    with torch.no_grad():
        for head in range(HEADS):  # half open, whatever it reads
            hybrid.get_decoder().layers[3].self_attn.q_proj.weight[gate_rows(head)] = 0
    _, half = seen(hybrid, INPUT_IDS, 3)
    torch.testing.assert_close(gated, 2 * scores * half)


def test_hybrid_models_show_the_gates_of_their_softmax_layers(hybrid, text, tmp_path):
    save(hybrid, tmp_path)
    scores = {index: naive_scores(hybrid, windows(text), index) for index in (1, 3)}
    model = measured(tmp_path, text)
    per_layer = model["per_layer"]
    expected = [scores[index].mean().item() if index in scores else None for index in range(4)]
    assert per_layer["gate_score"] == pytest.approx(expected, abs=1e-5)
    both = torch.stack(list(scores.values()))
    assert model["metrics"]["gate_score"] == pytest.approx(both.mean().item(), abs=1e-5)
    below = (both < 0.1).float().mean().item()
    assert model["metrics"]["gate_below_0.1"] == pytest.approx(below, abs=1e-4)
    for name in ("f_attn", "peak_column_share", "head_load_cv", "head_load", "column_share"):
        assert [value is None for value in per_layer[name]] == [True, False, True, False]
    assert None not in per_layer["max_activation"]


def test_a_model_that_also_sees_is_measured_by_its_text_part(text, tmp_path):
    """The published Qwen3.5 are such: text and vision in one checkpoint."""
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    config = Qwen3_5Config(
        text_config=SHAPE | HYBRID, vision_config=vision | {"out_hidden_size": 64}
    )
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    save(whole, tmp_path)
    expected = naive_scores(whole, windows(text), 3).mean().item()
    assert measured(tmp_path, text)["per_layer"]["gate_score"][3] == pytest.approx(
        expected, abs=1e-5
    )


PACKED = [("qwen3", False), ("qwen3", True), ("llama", True)]


@pytest.mark.parametrize(("family", "bias"), PACKED)
def test_a_checkpoint_in_the_published_layout_opens_as_it_lies(
    family, bias, granularity, tmp_path, monkeypatch
):
    expected = published(tmp_path / "published", family, granularity, bias)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, tokenizer = load_model(str(tmp_path / "published"))
    with torch.no_grad():
        torch.testing.assert_close(model(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert tokenizer("a")["input_ids"] and not model.training
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_checkpoint_on_the_hub_opens_too(tmp_path, monkeypatch):
    repository = tmp_path / "models--somebody--gated"
    expected = published(repository / "snapshots/123abc", "qwen3", "headwise")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, _ = load_model("somebody/gated")
    with torch.no_grad():
        torch.testing.assert_close(model(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_published_checkpoint_shows_its_gates(granularity, text, tmp_path):
    published(tmp_path, "qwen3", granularity)
    model, _ = load_model(str(tmp_path))
    inner = model.get_base_model()
    weights = load_file(tmp_path / "model.safetensors")
    expected = []
    for index in range(3):
        hidden_states, _ = seen(inner, windows(text), index)
        # For each key-value head its query heads, then their gates.
        packed = weights[f"model.layers.{index}.self_attn.q_proj.weight"].unflatten(
            0, (KV_HEADS, -1)
        )
        gate = packed[:, GROUPS * HEAD_DIM :].flatten(0, 1)
        expected.append(torch.sigmoid(hidden_states @ gate.T).mean().item())
    found = measured(tmp_path, text)
    assert found["per_layer"]["gate_score"] == pytest.approx(expected, abs=1e-5)
    assert found["metrics"]["gate_score"] == pytest.approx(sum(expected) / 3, abs=1e-5)
