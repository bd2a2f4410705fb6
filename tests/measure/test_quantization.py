"""Rounding to few bits, against naive references."""

import pytest
import torch
from evaluated import LENGTH, gated, loss, measured, windows
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

from retrofit.measure.quantization import (
    Quantization,
    quantized,
    rounded,
    rounded_in_groups,
    rounded_to_fp8,
)
from retrofit.utils.errors import UserError


def test_int8_is_the_nearest_of_255_steps():
    torch.manual_seed(0)
    values = torch.randn(3, 5, 16)
    for dims, whole in (((-2, -1), values.flatten(1)), ((-1,), values)):
        found = rounded(values, dims).view_as(whole)
        for row, original in zip(found.view(-1, whole.shape[-1]), whole.view(-1, whole.shape[-1]),
                                 strict=True):  # fmt: skip
            grid = torch.arange(-127, 128) * original.abs().max() / 127
            nearest = grid[(original[:, None] - grid).abs().argmin(-1)]
            torch.testing.assert_close(row, nearest)
    assert not rounded(torch.zeros(2, 3, 4), (-1,)).any()


def test_fp8_is_the_nearest_float_with_three_bits_of_mantissa():
    torch.manual_seed(0)
    values = torch.randn(3, 5, 16)
    found = rounded_to_fp8(values)
    mantissas, exponents = torch.arange(8), torch.arange(-6, 9)
    normal = (1 + mantissas / 8) * 2.0 ** exponents[:, None]
    subnormal = mantissas / 8 * 2.0**-6
    positive = torch.cat([subnormal, normal.flatten()])
    positive = positive[positive <= 448]  # the last one is NaN
    for matrix, original in zip(found, values, strict=True):
        grid = torch.cat([-positive, positive]) * original.abs().max() / 448
        error = (matrix - original).abs()
        nearest = (original.flatten()[:, None] - grid).abs().amin(-1).view_as(original)
        torch.testing.assert_close(error, nearest, rtol=1e-4, atol=1e-6)
    assert not rounded_to_fp8(torch.zeros(2, 3, 4)).any()


def test_four_bits_are_sixteen_even_steps_a_group():
    torch.manual_seed(0)
    weight = torch.randn(6, 97)  # a group of 64 and one of 33
    found = rounded_in_groups(weight, 64)
    for channels in (slice(0, 64), slice(64, 97)):
        for row, original in zip(found[:, channels], weight[:, channels], strict=True):
            step = (original.max() - original.min()) / 15
            assert 8 < len(row.unique()) <= 16
            assert (row - original).abs().max() <= step / 2 * 1.001 + step / 2
            assert (row / step - (row / step).round()).abs().max() < 1e-4, "0 is one of the steps"
    assert rounded_in_groups(torch.zeros(2, 32), 64).eq(0).all()


def test_quantized_layers_compute_with_rounded_inputs_and_weights(text):
    part = Quantization(length=LENGTH, windows=2, batch_size=1)
    model = gated()
    found = measured(model, text, part)["schemes"]
    input_ids = windows(text, 2)
    as_it_is = loss(model, input_ids)
    for scheme, dims in (("w8a8_per_tensor", (-2, -1)), ("w8a8_per_token", (-1,))):
        reference = gated()
        for module in reference.get_base_model().model.layers.modules():
            if isinstance(module, nn.Linear):
                weight = rounded(module.weight, dims)
                module.forward = lambda x, w=weight, d=dims, b=module.bias: F.linear(
                    rounded(x, d), w, b
                )
        expected = loss(reference, input_ids)
        assert found[scheme]["perplexity"] == pytest.approx(expected.mean().exp().item(), rel=1e-5)
        assert found[scheme]["nll_by_window"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert found[scheme]["kl"] > 0
    assert found["none"]["kl"] == 0
    assert found["none"]["nll_by_window"] == pytest.approx(as_it_is.tolist(), abs=1e-5)
    assert found["w4"]["kl"] > found["w8a8_per_token"]["kl"]


def test_nothing_is_left_of_it_in_the_model(text):
    model = gated()
    before = loss(model, windows(text, 1))
    with quantized(model.get_base_model(), lambda x, w: (x * 0, w)):
        assert not torch.equal(loss(model, windows(text, 1)), before)
    assert torch.equal(loss(model, windows(text, 1)), before)


def test_an_outlier_ruins_one_scale_a_tensor_and_not_one_a_token():
    values = torch.ones(1, 8, 16)
    values[0, 0, 3] = 1000.0
    assert rounded(values, (-2, -1))[0, 1:].eq(0).all()
    torch.testing.assert_close(rounded(values, (-1,))[0, 1:], values[0, 1:])


class RoundedLayer(DynamicLayer):
    """A cache that holds what `bits` leave of keys and values."""

    def __init__(self, bits):
        super().__init__()
        self.bits = bits

    def update(self, key_states, value_states, *args, **kwargs):
        states = (rounded_in_groups(each, 64, self.bits) for each in (key_states, value_states))
        return super().update(*states)


@pytest.mark.parametrize(("scheme", "bits"), [("kv8", 8), ("kv4", 4)])
def test_a_quantized_cache_is_read_by_attention(text, scheme, bits):
    model = gated()
    part = Quantization(length=LENGTH, windows=2, batch_size=1)
    found = measured(model, text, part)["schemes"][scheme]
    input_ids = windows(text, 2)
    cache = Cache(layers=[RoundedLayer(bits) for _ in model.get_base_model().model.layers])
    with torch.no_grad():
        log_p = model(input_ids, past_key_values=cache, use_cache=True).logits.double()
    log_p = log_p.log_softmax(-1)[:, :-1]
    nll = -log_p.gather(-1, input_ids[:, 1:, None]).mean()
    assert found["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-5)
    assert found["kl"] > 0


def test_what_cannot_be_measured_is_refused(text, tmp_path):
    model = gated()
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[: 2 * LENGTH - 1])
    with pytest.raises(UserError, match=f"the text has one window of {LENGTH} tokens"):
        measured(model, short, Quantization(length=LENGTH, windows=2))
    model.get_base_model().config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UserError, match="the weights of model are quantized already"):
        measured(model, text, Quantization(length=LENGTH, windows=2))
