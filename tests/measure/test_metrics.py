"""Streamed statistics against full attention matrices, and sinks that must not hide."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from tiny import SHAPE, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retrofit import GateConfig
from retrofit.adapters.modeling_gated import GatedConfig, GatedForCausalLM
from retrofit.gates import gate_layers
from retrofit.measure.attention_hooks import attention_watched, collect_layer_statistics
from retrofit.measure.metrics import ActivationStatistics, AttentionStatistics, attention_columns
from retrofit.measure.sinks import by_layer, read_model, summarize

LENGTH = 256
MODELS = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 150},
    "qwen2": {"use_sliding_window": True, "sliding_window": 150, "max_window_layers": 1},
}
FULL_ATTENTION = {"layer_types": ["full_attention"] * 3, "partial_rotary_factor": 1.0}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}


def tokens(batch: int = 4, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))


def gated_model(model_type: str, granularity: str | None, **settings):
    model = tiny_model(model_type, **settings)
    if granularity is None:
        return model
    config = GateConfig(granularity=granularity, init_weights=False, layers_to_transform=[0, 2])
    return get_peft_model(model, config).eval()


def inner(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def recorded(modules: dict[int, torch.nn.Module]) -> Iterator[dict[int, torch.Tensor]]:
    """The output of each module in one forward."""
    seen: dict[int, torch.Tensor] = {}

    def hook(index):
        return lambda _module, _args, output: seen.update({index: output})

    handles = [module.register_forward_hook(hook(index)) for index, module in modules.items()]
    yield seen
    for handle in handles:
        handle.remove()


def naive(model, input_ids: torch.Tensor) -> dict[str, float]:
    """Every metric that applies, from full matrices, written as its formula."""
    model = inner(model)
    model.set_attn_implementation("eager")
    gates = {index: gate.g_proj["default"] for index, gate in gate_layers(model).items()}
    decoder_layers = dict(enumerate(model.model.layers))
    read: dict[int, torch.Tensor] = {}
    for index, layer in decoder_layers.items():
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _module, args, index=index: read.update({index: args[0].double()})
        )
    with torch.no_grad(), recorded(gates) as doubled, recorded(decoder_layers) as hidden:
        output = model(input_ids, output_attentions=True)
    model.set_attn_implementation("sdpa")
    attention = torch.stack(output.attentions).double()  # [layers, batch, heads, T, T]
    length = input_ids.shape[1]
    first = attention[..., 0]
    shares = torch.stack(
        [attention[..., j + 64 :, j].mean(-1) for j in range(length - 128 + 1)], -1
    )
    load = 1 - first
    for index, gate in doubled.items():
        by_head = gate.double().mean(-1)
        load[index] *= by_head.transpose(1, 2)
    importance = load.mean((1, 3))
    activations = torch.stack([hidden[i].abs().amax(-1) for i in range(len(hidden))])
    states = torch.stack([hidden[i] for i in range(len(hidden))]).double().flatten(2)
    distance = states - states.mean(-1, keepdim=True)
    std = distance.square().mean(-1, keepdim=True).sqrt()
    inputs = torch.stack([read[i] for i in range(len(read))])
    apart = (inputs - inputs.mean((2, 3), keepdim=True)).flatten(2)
    log_p = output.logits.double().log_softmax(-1)[:, :-1]
    nll = -log_p.gather(-1, input_ids[:, 1:, None])
    figures = {
        "f_attn": first.mean(),
        "peak_column_share": shares.mean((0, 1, 2)).max(),
        "peak_column_position": shares.mean((0, 1, 2)).argmax(),
        "peak_share_per_head": shares.amax(-1).mean(),
        "sink_ratio": (first.mean((1, 3)) > 0.3).double().mean(),
        "max_activation": activations.amax(-1).mean(),
        "max_activation_first_token": activations[..., 0].mean(),
        "max_activation_any_window": activations.amax((1, 2)).mean(),
        "kurtosis": (distance / std).pow(4).mean(),
        "outlier_share": (distance.abs() > 6 * std).double().mean(),
        "down_proj_max_activation": inputs.abs().amax((2, 3)).mean(),
        "down_proj_kurtosis": (apart / apart.square().mean(-1, keepdim=True).sqrt()).pow(4).mean(),
        "head_load_cv": (importance.std(1, correction=0) / importance.mean(1)).mean(),
        "perplexity": nll.mean().exp(),
        "perplexity_far": nll[:, 63:].mean().exp(),
        "kl_to_base": 0,
    }
    if doubled:
        scores = torch.cat([gate.flatten() / 2 for gate in doubled.values()])
        figures |= {"gate_score": scores.mean(), "gate_below_0.1": (scores < 0.1).double().mean()}
    return {name: float(value) for name, value in figures.items()}


@pytest.mark.parametrize("granularity", [None, "headwise", "elementwise"])
@pytest.mark.parametrize("model_type", MODELS)
def test_every_metric_equals_its_formula_on_full_matrices(model_type, granularity):
    model = gated_model(model_type, granularity, **MODELS[model_type])
    input_ids = tokens()
    expected = naive(model, input_ids)
    layers, predictions = read_model(model, input_ids.split(2), None)
    figures = summarize(layers, predictions)
    applicable = {name: value for name, value in figures.items() if value is not None}
    assert applicable == pytest.approx(expected, rel=1e-4)
    assert ("gate_score" in applicable) == (granularity is not None)
    assert expected.get("gate_below_0.1") != 0, "gates must be spread for this test to count"


def test_layers_report_by_their_own_index():
    model = gated_model("llama", "headwise")
    layers, _ = read_model(model, tokens().split(2), None)
    figures = by_layer(layers)
    assert [score is not None for score in figures["gate_score"]] == [True, False, True]
    assert sum(figures["gate_histogram"][2]) == pytest.approx(1)
    assert len(figures["gate_histogram"][2]) == 20
    assert [len(shares) for shares in figures["column_share"]] == [32] * 3
    model.set_attn_implementation("eager")
    attentions = model(tokens(), output_attentions=True).attentions
    assert figures["f_attn"] == pytest.approx([a[..., 0].mean().item() for a in attentions])


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_next"])
def test_stock_checkpoints_show_the_gates_packed_in_q_proj(model_type):
    model = tiny_model(model_type, **FULL_ATTENTION)
    attention = model.model.layers[1].self_attn
    with recorded({0: model.model.layers[1].input_layernorm}) as seen, torch.no_grad():
        layers, _ = read_model(model, [tokens()], None)
        packed = attention.q_proj(seen[0]).unflatten(-1, (4, 2, 16))
    assert layers[1].gate.score == pytest.approx(packed[..., 1, :].sigmoid().mean().item())


@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
def test_checkpoints_with_code_of_their_own_show_their_gates(granularity):
    config = GatedConfig(**SHAPE, gated_layers=[0, 2], gate_granularity=granularity)
    torch.manual_seed(0)
    model = GatedForCausalLM(config).eval()
    gates = {index: model.model.layers[index].self_attn.attn_gate.g_proj for index in (0, 2)}
    with recorded(gates) as logits:
        layers, _ = read_model(model, [tokens()], None)
    assert layers[1].gate is None
    for index in gates:
        assert layers[index].gate.score == pytest.approx(logits[index].sigmoid().mean().item())


def test_layers_without_softmax_attention_are_left_out():
    layers, _ = read_model(tiny_model("qwen3_5_text", **HYBRID), [tokens()], None)
    figures = by_layer(layers)
    assert [value is not None for value in figures["f_attn"]] == [False, True, False]
    assert all(figures["max_activation"])


def test_experts_have_no_down_proj_of_one_layer():
    layers, predictions = read_model(tiny_model("qwen3_moe"), [tokens()], None)
    assert by_layer(layers)["down_proj_kurtosis"] == [None] * 3
    assert summarize(layers, predictions)["down_proj_max_activation"] is None


def test_outliers_are_counted_by_their_formula():
    torch.manual_seed(0)
    states = torch.randn(2, 40, 64)
    states[0, 3, :5] = 60.0  # of 2,560 entries; the other sequence has none
    statistics = ActivationStatistics()
    statistics.add(states)
    assert statistics.outlier_share == pytest.approx(5 / 2560 / 2)
    pooled = [(x - x.mean()) / (x - x.mean()).square().mean().sqrt() for x in states.double()]
    expected = sum(x.pow(4).mean() for x in pooled) / 2
    assert statistics.kurtosis == pytest.approx(expected.item(), rel=1e-5)
    assert expected > 100, "a few large ones make it"


def planted(positions: list[int], length: int = 320) -> AttentionStatistics:
    """One head for each position, which draws most of that head's attention from wherever it is
    visible."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 2, len(positions), length, 16, generator=generator) / 4
    queries[..., 0] = 1
    for head, position in enumerate(positions):
        keys[:, head, position, 0] = 10
    statistics = AttentionStatistics()
    statistics.add(attention_columns(queries, keys, scaling=1.0))
    return statistics


def test_a_sink_on_the_first_token_is_seen_by_all():
    sink = planted([0, 0, 0, 0])
    assert sink.f_attn > 0.9
    assert sink.sink_ratio == 1
    assert sink.column_share.argmax() == 0
    assert sink.column_share.max() > 0.9


def test_a_sink_that_moved_is_lost_to_first_token_metrics_but_not_to_the_peak():
    sink = planted([5, 5, 5, 5])
    assert sink.f_attn < 0.05
    assert sink.sink_ratio == 0
    assert sink.column_share.argmax() == 5
    assert sink.column_share.max() > 0.9


def test_sinks_that_differ_by_head_cannot_hide_in_the_average():
    sink = planted([0, 5, 40, 190])
    assert sink.column_share.max() < 0.3
    assert sink.peak_share_per_head > 0.9


def test_honest_local_attention_is_not_a_sink():
    keys = torch.nn.functional.one_hot(torch.arange(320), 320).float()[None, None]
    statistics = AttentionStatistics()
    statistics.add(attention_columns(20 * keys.roll(-3, -1), keys, scaling=1.0))
    statistics.add(attention_columns(20 * keys, keys, scaling=1.0))
    assert statistics.column_share.max() < 0.01


@pytest.mark.parametrize("block", [1, 50, 256, 1000])
def test_the_block_size_changes_nothing(block):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, LENGTH, 16, generator=generator)
    keys = torch.randn(2, 2, LENGTH, 16, generator=generator)
    expected = attention_columns(queries, keys, 0.25)
    torch.testing.assert_close(attention_columns(queries, keys, 0.25, block=block), expected)


def test_padded_batches_run_as_under_sdpa_and_padding_pays_no_attention():
    model = tiny_model("llama")
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :100] = 0
    seen = []
    with torch.no_grad():
        expected = model(tokens(2), attention_mask=mask).logits
        with attention_watched(model, lambda *args: seen.append(attention_columns(*args[1:]))):
            logits = model(tokens(2), attention_mask=mask).logits
    assert torch.equal(logits, expected)
    for first, share, _ in seen:
        assert first.isfinite().all()
        assert not first[0].any() and not share[0, :, :100].any()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_attention_implementation_is_restored_even_after_an_error(implementation):
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    before = set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), collect_layer_statistics(model):
        assert model.config._attn_implementation not in ("sdpa", "eager")
        raise KeyboardInterrupt
    assert model.config._attn_implementation == implementation
    assert (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)) == before
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return output


def test_no_full_attention_matrix_or_logits_ever_exist():
    length, heads = 2048, 4
    model = tiny_model("llama", max_position_embeddings=length, num_hidden_layers=1)
    with LargestTensor() as largest:
        read_model(model, [tokens(1, length)], None)
    assert largest.numel <= heads * length * length / 16
