import pytest
import torch

from modeling_qbert import ops
from modeling_qbert.layers import WeightSpec
from modeling_qbert.ops import (
    SoftmaxCodes,
    dequantize_weight,
    linear_codes,
    matmul_codes,
    quantized_linear,
    quantized_matmul,
)
from modeling_qbert.quantizers import (
    GRANULARITIES,
    WEIGHT_QUANTIZERS,
    ActivationQuantizer,
    Quantized,
    codes_from_lat_scale,
    expand_scale,
    lat_scale,
    quantize_bwn,
    quantize_symmetric,
    quantize_twn,
    scale_shape,
    ternary_codes,
)


GROUP = 3
EVERY_WEIGHT = [(quantizer, granularity) for quantizer in WEIGHT_QUANTIZERS for granularity in GRANULARITIES]
EVERY_ACTIVATION = [
    ActivationQuantizer(bits, symmetric, per_tensor)
    for bits in (4, 8)
    for symmetric in (True, False)
    for per_tensor in (True, False)
]


def quantize(quantizer, weight, granularity, group_size=GROUP):
    spec = WeightSpec(quantizer, granularity, group_size)
    return spec.quantize(weight, lat_scale(weight, None, granularity, group_size) if quantizer == "lat" else None)


def check(quantized, codes, scale):
    assert quantized.codes.dtype == torch.int8 and quantized.codes.tolist() == codes
    torch.testing.assert_close(quantized.scale, torch.tensor(scale))


def test_twn_by_hand():
    weight = torch.tensor([[1.0, -2.0, 0.1, 0.5], [0.0, 0.3, -0.3, 3.0]])
    check(quantize_twn(weight, "per_row", GROUP), [[1, -1, 0, 0], [0, 0, 0, 1]], [[1.5], [3.0]])
    # mean 0.9, threshold 0.63: three weights above
    check(quantize_twn(weight, "per_tensor", GROUP), [[1, -1, 0, 0], [0, 0, 0, 1]], [[2.0]])
    # groups of 3 and 1 columns: the short group's mean is over its one weight
    check(quantize_twn(weight, "per_group", GROUP), [[1, -1, 0, 1], [0, 1, -1, 1]], [[1.5, 0.5], [0.3, 3.0]])


def test_bwn_by_hand():
    weight = torch.tensor([[1.0, -2.0, 0.1, 0.5], [0.0, 0.3, -0.3, 3.0]])
    codes = [[1, -1, 1, 1], [1, 1, -1, 1]]
    check(quantize_bwn(weight, "per_row", GROUP), codes, [[0.9], [0.9]])
    check(quantize_bwn(weight, "per_tensor", GROUP), codes, [[0.9]])
    check(quantize_bwn(weight, "per_group", GROUP), codes, [[3.1 / 3, 0.5], [0.2, 3.0]])


def test_threshold_is_strict():
    assert ternary_codes(torch.tensor([[0.5, -0.5, 0.6, -0.6, 0.0]]), torch.tensor([[0.5]]), GROUP).tolist() == [
        [0, 0, 1, -1, 0]
    ]


def test_symmetric_8_bit_by_hand():
    weight = torch.tensor([[1.27, -0.5, 0.004, 0.0], [-2.54, 1.0, 0.011, 0.63]])
    check(quantize_symmetric(weight, "per_row", GROUP), [[127, -50, 0, 0], [-127, 50, 1, 32]], [[0.01], [0.02]])
    check(quantize_symmetric(weight, "per_tensor", GROUP), [[64, -25, 0, 0], [-127, 50, 1, 32]], [[0.02]])


def test_lat_by_hand():
    weight = torch.tensor([[1.0, 0.4, -0.2]])
    flat = lat_scale(weight, None, "per_row", GROUP)
    check(codes_from_lat_scale(weight, flat, GROUP), [[1, 1, 0]], [[0.7]])
    steep = lat_scale(weight, torch.tensor([[1.0, 100.0, 1.0]]), "per_row", GROUP)
    check(codes_from_lat_scale(weight, steep, GROUP), [[1, 1, 0]], [[41 / 101]])
    none = lat_scale(weight, torch.zeros(1, 3), "per_row", GROUP, start=torch.tensor([[0.25]]))
    check(codes_from_lat_scale(weight, none, GROUP), [[1, 1, -1]], [[0.25]])  # no curvature: the scale stays


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("seed", range(5))
def test_lat_never_costs_more_than_twn(granularity, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(9, 22, generator=generator)
    curvature = torch.rand(9, 22, generator=generator).pow(4) + 1e-6

    def cost(quantized):
        return (curvature * (dequantize_weight(quantized, 5) - weight) ** 2).sum().item()

    scale = lat_scale(weight, curvature, granularity, 5)
    costs = [cost(quantize_twn(weight, granularity, 5)), cost(codes_from_lat_scale(weight, scale, 5))]
    scale = lat_scale(weight, curvature, granularity, 5, start=scale, iterations=1)
    costs.append(cost(codes_from_lat_scale(weight, scale, 5)))
    assert costs[1] < costs[0] and costs[2] <= costs[1] * (1 + 1e-6)


@pytest.mark.parametrize("quantizer, granularity", EVERY_WEIGHT)
@pytest.mark.parametrize("shape", [(4, 7), (5, 1), (1, 1), (3, 3), (1, 10)])
def test_every_weight_quantizer(quantizer, granularity, shape):
    """Shapes, alphabets and errors: a ternary code is the nearest of three values but for TWN's threshold."""
    weight = torch.randn(shape)
    quantized = quantize(quantizer, weight, granularity)
    bits = WEIGHT_QUANTIZERS[quantizer][0]
    bound = 1 if bits <= 2 else 2 ** (bits - 1) - 1
    assert quantized.codes.dtype == torch.int8 and quantized.codes.shape == shape
    assert quantized.codes.abs().max() <= bound
    assert quantized.scale.shape == scale_shape(*shape, granularity, GROUP)
    assert bool((quantized.scale > 0).all())
    error = (dequantize_weight(quantized, GROUP) - weight).abs()
    scale = expand_scale(quantized.scale, shape[1], GROUP)
    inside = weight.abs() <= scale * bound
    slack = {"twn": 1.0, "bwn": 1.0, "centered": 3.0}.get(quantizer, 0.5)  # the least that tells rubbish apart
    assert bool((error <= slack * scale * (1 + 1e-5))[inside].all())
    if granularity != "per_tensor":  # a row is quantized alone: embeddings quantize only the rows looked up
        alone = quantize(quantizer, weight[:1], granularity)
        assert torch.equal(alone.codes, quantized.codes[:1]) and torch.equal(alone.scale, quantized.scale[:1])


@pytest.mark.parametrize("quantizer, granularity", EVERY_WEIGHT)
def test_zero_groups_are_zero_and_finite(quantizer, granularity):
    weight, bits = torch.zeros(3, 7), WEIGHT_QUANTIZERS[quantizer][0]
    quantized = quantize(quantizer, weight, granularity)
    assert bool((quantized.scale > 0).all()) and not (quantized.scale > 1e-20).any()
    if bits == 1:
        assert bool((quantized.codes == 1).all())  # zero is +1 in the binary alphabet
        return
    assert not quantized.codes.any()
    weight[1, 6] = 2.0
    quantized = quantize(quantizer, weight, granularity)
    value = dequantize_weight(quantized, GROUP)
    torch.testing.assert_close(value, weight)


@pytest.mark.parametrize("quantizer, granularity", EVERY_WEIGHT)
def test_not_a_number_is_loud(quantizer, granularity):
    weight = torch.randn(3, 7)
    weight[0, 0] = torch.nan
    assert bool(dequantize_weight(quantize(quantizer, weight, granularity), GROUP).isnan().any())


@pytest.mark.parametrize("quantizer, granularity", EVERY_WEIGHT)
def test_threads_do_not_change_a_scale(quantizer, granularity):
    weight = torch.randn(700, 311)
    one = quantize(quantizer, weight, granularity)
    torch.set_num_threads(2)
    two = quantize(quantizer, weight, granularity)
    assert torch.equal(one.scale, two.scale) and torch.equal(one.codes, two.codes)


@pytest.mark.parametrize("quantizer", EVERY_ACTIVATION)
@pytest.mark.parametrize("shift", [0.0, 5.0, -0.3])
def test_activation_error_is_half_a_step(quantizer, shift):
    x = torch.randn(4, 6, 19) * torch.logspace(-3, 2, 6).view(1, 6, 1) + shift
    quantized = quantizer.quantized(x)
    assert quantized.scale.shape == ((1, 1, 1) if quantizer.per_tensor else (4, 6, 1))
    levels = 2 ** (quantizer.bits - 1)
    assert torch.equal(quantized.codes, quantized.codes.round())
    assert quantized.codes.max() <= levels - 1
    assert quantized.codes.min() >= (1 - levels if quantizer.symmetric else -levels)
    assert (quantized.offset is None) == quantizer.symmetric
    error = (quantized.dequantize() - x).abs()
    rounding = 1e-6 * x.abs().amax((-1,), keepdim=True) * (levels if shift else 1)
    assert bool((error <= quantized.scale / 2 * (1 + 1e-4) + rounding).all())


@pytest.mark.parametrize("quantizer", EVERY_ACTIVATION)
def test_activation_of_equal_values(quantizer):
    for value in (0.0, 1.0, -3.0, 1e-35):
        x = torch.full((2, 3, 5), value)
        torch.testing.assert_close(quantizer.quantized(x).dequantize(), x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("quantizer", EVERY_ACTIVATION)
def test_masked_positions_widen_no_range(quantizer):
    x = torch.randn(2, 4, 6)
    valid = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool).unsqueeze(-1)
    noisy = torch.where(valid, x, 1e4 * torch.randn(2, 4, 6))
    dims = (-2, -1)
    one, two = (
        quantizer.quantized(noisy, valid, dims),
        quantizer.quantized(torch.where(valid, x, x[:1, :1, :1]), None, dims),
    )
    if quantizer.per_tensor:
        kept = x[valid.squeeze(-1)]
        two = quantizer.quantized(kept)
        assert torch.equal(one.codes[valid.squeeze(-1)], two.codes)
        assert torch.equal(one.scale.flatten(), two.scale.flatten())
    else:
        for row, count in enumerate((3, 1)):
            alone = quantizer.quantized(x[row : row + 1, :count], None, dims)
            assert torch.equal(one.codes[row : row + 1, :count], alone.codes)
            assert torch.equal(one.scale[row], alone.scale[0])
    levels = 2 ** (quantizer.bits - 1)
    assert one.codes.min() >= -levels and one.codes.max() <= levels - 1  # or the cast to int8 would wrap
    nothing = quantizer.quantized(noisy, torch.zeros_like(valid), dims)
    assert bool(torch.isfinite(nothing.dequantize()).all())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("columns, bound", [(1, 1), (1, 127), (3, 1), (769, 1), (3072, 1), (1030, 127), (2500, 127)])
def test_products_of_codes_are_exact(monkeypatch, fast, columns, bound):
    monkeypatch.setattr(ops, "has_fast_int8", lambda device: fast)  # noqa: ARG005
    x = torch.randint(-128, 128, (5, columns), dtype=torch.int8)
    weight = torch.randint(-bound, bound + 1, (7, columns), dtype=torch.int8)
    x[0], weight[0] = -128, bound
    expected = x.long() @ weight.long().t()
    assert torch.equal(matmul_codes(x, weight, bound), expected.float())


def linear_case(quantizer, granularity, activation):
    x, weight, bias = torch.randn(6, 10), torch.randn(4, 10), torch.randn(4)
    spec = WeightSpec(quantizer, granularity, GROUP)
    a, w = activation.quantized(x), quantize(quantizer, weight, granularity)
    a = Quantized(a.codes.to(torch.int8), *(part if part is None else part.reshape(-1, 1) for part in a[1:]))
    return x, weight, bias, a, w, spec


@pytest.mark.parametrize("quantizer, granularity", EVERY_WEIGHT)
@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_linear_is_the_dequantized_product_and_its_gradients(quantizer, granularity, activation):
    x, weight, bias, a, w, spec = linear_case(quantizer, granularity, activation)
    x_value, w_value = a.dequantize(), dequantize_weight(w, GROUP)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    values = [t.clone().requires_grad_() for t in (x_value, w_value, bias)]
    y = quantized_linear(*leaves, a, w, spec.bound, GROUP)
    expected = torch.nn.functional.linear(*values)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(quantized_linear(x, None, bias, a, w, spec.bound, GROUP), y)
    assert torch.equal(linear_codes(a, w, bias, spec.bound, GROUP), y)
    grad = torch.randn_like(y)
    got, want = torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, values, grad)
    for one, two in zip(got, want):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("symmetric", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_is_the_dequantized_product_and_its_gradients(symmetric, bits):
    a, b = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 8, 6)
    a_quantized = ActivationQuantizer(bits, symmetric[0], False).quantized(a)
    b_quantized = ActivationQuantizer(bits, symmetric[1], False).quantized(b, None, (-2, -1))
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    values = [a_quantized.dequantize().requires_grad_(), b_quantized.dequantize().requires_grad_()]
    y, expected = quantized_matmul(*leaves, a_quantized, b_quantized), values[0] @ values[1]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(quantized_matmul(a, b, a_quantized, b_quantized), y)
    grad = torch.randn_like(y)
    for one, two in zip(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, values, grad)):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=["native", "torch"])
def softmax_path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(ops, "drop", None)
    elif ops.drop is None:
        pytest.skip("the native engine is not there")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_softmax_codes(softmax_path, bits, per_tensor, p):  # noqa: ARG001
    scores = (3 * torch.randn(2, 2, 5, 5)).requires_grad_()
    mask = torch.zeros(2, 1, 1, 5)
    mask[1, ..., 3:] = torch.finfo(torch.float32).min
    valid = (mask == 0).transpose(-1, -2) if per_tensor else None
    probabilities, carrier, codes, scale = SoftmaxCodes.apply(scores + mask, bits, per_tensor, valid, p)
    expected = torch.softmax(scores + mask, -1)
    torch.testing.assert_close(probabilities, expected)
    assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() == 2**bits - 1
    assert not codes[1, ..., 3:].any()
    real = slice(None) if not per_tensor else slice(0, 3)
    # What dropout keeps shows in the gradient: of a sum of probabilities it is 1 / (1 - p) there, before the softmax.
    every_code = SoftmaxCodes.apply(scores + mask, bits, per_tensor, valid)[2]
    kept = (codes > 0) | (every_code == 0)
    error = (codes * scale * (1 - p) - expected * kept).abs()
    assert bool((error <= scale / 2 * (1 + 1e-4))[:, :, real].all())
    dropped = int((~kept).sum())
    assert (dropped == 0) == (p == 0) and torch.equal(codes, every_code * kept)
    grad = torch.randn_like(expected)
    (one,), (two,) = (torch.autograd.grad(x, scores, grad, retain_graph=True) for x in (probabilities, expected))
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    if bits == 8 and bool((every_code > 0)[0].all()):  # sentence 0 has no padding: each dropped number shows
        (one,) = torch.autograd.grad(carrier, scores, grad, retain_graph=True)
        (two,) = torch.autograd.grad(expected * kept / (1 - p), scores, grad, retain_graph=True)
        torch.testing.assert_close(one[0], two[0], atol=1e-6, rtol=1e-5)
    (both,) = torch.autograd.grad([probabilities, carrier], scores, [grad, 2 * grad], retain_graph=True)
    (first,), (second,) = (torch.autograd.grad(x, scores, grad, retain_graph=True) for x in (probabilities, carrier))
    torch.testing.assert_close(both, first + 2 * second, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_softmax_codes_do_not_see_padding(softmax_path, bits):  # noqa: ARG001
    scores = 3 * torch.randn(1, 2, 4, 4)
    padded = torch.cat([scores, torch.full((1, 2, 4, 9), torch.finfo(torch.float32).min)], -1)
    alone, wide = SoftmaxCodes.apply(scores, bits, False, None), SoftmaxCodes.apply(padded, bits, False, None)
    assert torch.equal(alone[2], wide[2][..., :4]) and torch.equal(alone[3], wide[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_follows_the_seed_and_keeps_the_mean(softmax_path, dtype):  # noqa: ARG001
    x = torch.randn(7, 300, 33, dtype=dtype).requires_grad_()
    torch.manual_seed(5)
    first = ops.dropout(x, 0.1)
    (grad,) = torch.autograd.grad(first, x, torch.ones_like(x))
    torch.manual_seed(5)
    again, other = ops.dropout(x, 0.1), ops.dropout(x, 0.1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    kept = grad != 0
    assert abs(float(kept.float().mean()) - 0.9) < 0.005  # 69,300 numbers: standard deviation 0.0011
    torch.testing.assert_close(first, torch.where(kept, x / 0.9, 0.0))
    torch.testing.assert_close(grad, (kept / 0.9).to(dtype))
    assert torch.equal(ops.dropout(x, 0.0), x) and not ops.dropout(x, 1.0).any()


@pytest.mark.parametrize("quantizer, granularity", [("twn", "per_row"), ("bwn", "per_tensor"), ("twn", "per_group")])
def test_gradients_under_autocast_keep_an_exact_forward(quantizer, granularity, monkeypatch):
    x, weight, bias, a, w, spec = linear_case(quantizer, granularity, ActivationQuantizer(8, False, False))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    plain = quantized_linear(*leaves, a, w, spec.bound, GROUP)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = quantized_linear(*leaves, a, w, spec.bound, GROUP)
    assert torch.equal(plain, mixed)
    gradients = torch.autograd.grad(mixed.sum(), leaves)
    for one, two in zip(torch.autograd.grad(plain.sum(), leaves), gradients):
        assert one.dtype == two.dtype == torch.float32
        torch.testing.assert_close(one, two, atol=0.1, rtol=0.02)
    monkeypatch.setattr(ops, "drop", None)  # without the engine: the same numbers, summed in another order
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_torch = quantized_linear(*leaves, a, w, spec.bound, GROUP)
    assert torch.equal(in_torch, mixed)
    for one, two in zip(torch.autograd.grad(in_torch.sum(), leaves), gradients):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
