"""The float steps between products: the same bits as the formulas of `ops` and `quantizers` on every path."""

import itertools
import os
import types

import numpy as np
import pytest
import torch

from modeling_qbert import ghost, native, ops
from modeling_qbert import native_training as in_training
from modeling_qbert.attention import quantized_attention
from modeling_qbert.layers import _quantize_input, quantize_signed
from modeling_qbert.quantizers import ActivationQuantizer, LsqQuantizer, PactQuantizer, Quantized, softmax_codes


def numbers(*shape: int) -> torch.Tensor:
    """Rows of very different size, some constant, some zero."""
    x = torch.randn(shape) * 10 ** torch.linspace(-6, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    x[0], x[-1] = 0.0, 2.5
    x[1] = 1 + torch.rand(shape[1:]) / 1e5  # narrow and far from 0
    return x


def lsq(bits: int, step: float, low: float | None = None) -> LsqQuantizer:
    quantizer = LsqQuantizer(bits, low, 100)
    quantizer.step.data.fill_(step)
    return quantizer


def pact(symmetric: bool, low: float, high: float) -> PactQuantizer:
    quantizer = PactQuantizer(ActivationQuantizer(8, symmetric, False))
    quantizer.clip.data.copy_(torch.tensor([low, high]))
    return quantizer


QUANTIZERS = {
    **{
        f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}": ActivationQuantizer(bits, symmetric, False)
        for bits, symmetric in itertools.product((8, 4), (True, False))
    },
    "pact": pact(True, -1.3, 0.9),
    "pact, asymmetric": pact(False, -0.17, 2.0),
    "lsq 4": lsq(4, 0.037),
    "lsq 8": lsq(8, 0.0021),
    "lsq 4 above": lsq(4, 0.11, -0.1700),
    "lsq 4 above 0": lsq(4, 0.11, 0.0),
    "lsq 8 above": lsq(8, 0.011, -0.1700),
    "1 bit above 0": lsq(1, 0.11, 0.0),
    "signs": lsq(1, 0.3),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("columns", [1, 16, 47, 768])
def test_codes(level, name, columns):  # noqa: ARG001
    x, quantizer = numbers(23, columns), QUANTIZERS[name]
    if name == "signs":
        quantizer.shift = torch.nn.Parameter(x[11].clone())
    with torch.no_grad():
        expected = quantize_signed(x, quantizer)[1]
    codes, scale, offset = native.quantize(x, native.place_of(quantizer))
    assert torch.equal(codes, expected.codes)
    assert torch.equal(scale, expected.scale.expand(23, 1))
    assert torch.equal(offset, torch.zeros(23, 1) if expected.offset is None else expected.offset.expand(23, 1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_with_hidden_rows(level, symmetric):  # noqa: ARG001
    x, real = numbers(23, 47).view(1, 23, 47), torch.rand(1, 23, 1) < 0.6
    quantizer = ActivationQuantizer(8, symmetric, False)
    found, expected = ops.quantize_rows(x, quantizer, real)[1], quantizer.quantized(x, real)
    assert found.codes.dtype == torch.int8 and torch.equal(found.codes.float(), expected.codes[0])
    assert torch.equal(found.scale, expected.scale[0])
    assert found.offset is None if symmetric else torch.equal(found.offset, expected.offset[0])


@pytest.mark.parametrize("columns", [1, 15, 768])
def test_gelu(level, columns):  # noqa: ARG001
    x = torch.cat([numbers(40, columns), torch.linspace(-12, 12, 60).view(-1, 1).expand(60, columns)])
    assert torch.equal(native.gelu(x), ops.gelu(x))
    near = x.abs() < 12
    exact = torch.nn.functional.gelu(x.double())
    assert float((ops.gelu(x).double() - exact)[near].abs().max()) < 2e-6


@pytest.mark.parametrize("columns", [1, 15, 36, 768])
def test_layer_norm(level, columns):  # noqa: ARG001
    x, weight, bias = numbers(50, columns), torch.randn(columns), torch.randn(columns)
    expected = ops.layer_norm(x, weight, bias, 1e-12)
    assert torch.equal(native.layer_norm(x, weight, bias, 1e-12), expected)
    exact = torch.nn.functional.layer_norm(x.double(), (columns,), weight.double(), bias.double(), 1e-12)
    clear = x.std(-1, correction=0) > 1e-3  # of numbers all but equal, any float32 norm is noise
    torch.testing.assert_close(expected[clear].double(), exact[clear], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens, size", [(1, 4), (2, 12), (7, 20), (33, 32), (64, 64), (129, 64)])
@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "4 bits", "lsq", "pact", "1 bit"])
def test_attention(level, tokens, size, kind):
    if level == "scalar" and tokens > 64:
        pytest.skip("slow, and the same code as for fewer tokens")
    query, key, value = (3 * torch.randn(tokens, size) for _ in range(3))
    bits = 4 if kind == "4 bits" else 8
    learned = kind in ("lsq", "1 bit")
    spec = ActivationQuantizer(bits, kind == "symmetric" or learned, False)
    module = types.SimpleNamespace(config=types.SimpleNamespace(activation_quantizer_spec=spec), training=False)
    if learned or kind == "pact":
        module.config.activation_quantizer_spec = None if learned else spec
        for part in ("query", "key", "value"):
            own = lsq(1 if kind == "1 bit" else 4, 0.6) if learned else pact(True, -4.0, 3.0)
            if kind == "1 bit":
                own.shift = torch.nn.Parameter(torch.randn(size))
            setattr(module, f"{part}_quantizer", own)
        if learned:
            module.probability_quantizer = lsq(1, 0.1, 0.0) if kind == "1 bit" else lsq(4, 0.03, 0.0)
    names = ("query", "key", "value", "probability")
    quantizers = [getattr(module, f"{name}_quantizer", spec) for name in names]
    with torch.no_grad():
        expected = quantized_attention(module, query[None, None], key[None, None], value[None, None], None)[0]
    places = [native.place_of(quantizer, name != "probability") for quantizer, name in zip(quantizers, names)]
    assert torch.equal(native.attention(query, key, value, size**-0.5, places), expected[0, :, 0])


def test_random_ghosts(level):
    """`QBERT_CASES` sets how many. Tokens are hidden anywhere; rows of numbers lie off any alignment."""
    generator = np.random.default_rng(native.LEVELS.index(level))
    for _ in range(int(os.environ.get("QBERT_CASES", "200")) // 4):
        batch, tokens, features = generator.integers(1, 5, 3).tolist()
        tokens *= int(generator.integers(1, 5))
        size = 2 * int(generator.integers(0, 4)) + 1
        columns = max(1, 16 * int(generator.integers(0, 4)) + int(generator.integers(-2, 3)))
        normalization = ("softmax", "none")[generator.integers(2)]
        module = ghost.GhostFeatures(0.1, features, columns, size, normalization, "relu").eval()
        torch.nn.init.normal_(module.ghost_scale)
        y = torch.randn(batch * tokens * columns + 64)[int(generator.integers(64)) :]
        y = y[: batch * tokens * columns].view(batch, tokens, columns)
        real = torch.from_numpy(generator.random((batch, tokens)) < generator.choice([0.3, 0.9, 1.0]))
        weights = native.GhostWeights(
            module.kernels().detach().transpose(1, 2).contiguous(), module.ghost_scale.detach()
        )
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(ghost, "_running", types.SimpleNamespace(real_tokens=real))
            expected = module(y)[real]
        assert torch.equal(in_training.ghost_features(y, real, weights)[real], expected), (
            tokens,
            features,
            size,
            columns,
        )


def test_random_ghosts_in_training(level):
    """Sums as `GhostFeatures` has them without the engine, gradients as those of torch, on any number of threads."""
    generator = np.random.default_rng(native.LEVELS.index(level))
    for _ in range(int(os.environ.get("QBERT_CASES", "200")) // 4):
        batch, tokens, features = generator.integers(1, 5, 3).tolist()
        size = 2 * int(generator.integers(0, 4)) + 1
        columns = max(1, 16 * int(generator.integers(0, 4)) + int(generator.integers(-2, 3)))
        module = ghost.GhostFeatures(0.0, features, columns, size, ("softmax", "none")[generator.integers(2)], "relu")
        torch.nn.init.normal_(module.ghost_scale)
        y, gradient = torch.randn(2, batch, tokens, columns)
        real = None
        if generator.random() < 0.7:
            real = torch.from_numpy(generator.random((batch, tokens)) < 0.8)
            gradient[~real] = 0
        found = []
        for threads, training in ((1, True), (3, True), (1, False)):  # in eval mode the module is plain torch
            source = y.clone().requires_grad_()
            module.zero_grad()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ghost, "_running", types.SimpleNamespace(real_tokens=real))
                patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                total = module.train(training)(source)
            assert (type(total.grad_fn).__name__ == "_GhostSumsBackward") == training
            total.backward(gradient)
            sums = total.detach() if real is None else total.detach()[real]
            found.append((sums, source.grad, module.ghost_scale.grad, module.ghost_kernel.grad))
        (one, three, plain) = found
        assert all(torch.equal(*pair) for pair in zip(one, three))
        assert torch.equal(one[0], plain[0])
        for ours, theirs in zip(one[1:], plain[1:]):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_what_is_no_number_is_none_in_training(level, monkeypatch):  # noqa: ARG001
    monkeypatch.setattr(ghost, "_running", types.SimpleNamespace(real_tokens=None))
    module = ghost.GhostFeatures(0.0, 2, 20, 3, "none", "relu")
    torch.nn.init.normal_(module.ghost_scale)
    for where in ("kernel", "token"):
        y, found = torch.randn(2, 5, 20), []
        with torch.no_grad():
            (module.ghost_kernel[1, 4] if where == "kernel" else y[1, 2])[1] = float("nan")
        for training in (True, False):
            source = y.clone().requires_grad_()
            module.zero_grad()
            total = module.train(training)(source)
            total.sum().backward()
            found.append([part.isnan() for part in (total, source.grad, module.ghost_scale.grad)])
        assert bool(found[0][0].any()) and all(torch.equal(*pair) for pair in zip(*found)), where
        module.reset()
        torch.nn.init.normal_(module.ghost_scale)
    scores = torch.randn(3, 20)
    scores[1, 7] = float("nan")
    for part in in_training.softmax_codes(scores, 8, in_training.Dropout(0, 0.0)):
        assert part.isnan().any(-1).tolist() == [False, True, False]


def test_ghosts_train_with_a_mask_for_all_sentences(monkeypatch):
    module = ghost.GhostFeatures(0.0, 2, 20, 3, "none", "relu")
    torch.nn.init.normal_(module.ghost_scale)
    y, real = torch.randn(3, 5, 20), torch.tensor([[True, True, False, True, True]])
    monkeypatch.setattr(ghost, "_running", types.SimpleNamespace(real_tokens=real))
    found, expected = module.train()(y), module.eval()(y)
    assert torch.equal(found[:, real[0]], expected[:, real[0]])


def test_ghost_gradients_of_long_kernels_are_torchs(monkeypatch):
    monkeypatch.setattr(ghost, "_running", types.SimpleNamespace(real_tokens=None))
    module = ghost.GhostFeatures(0.0, 1, 4, in_training.MOST_TAPS + 2, "none", "relu")
    total = module(torch.randn(1, 30, 4))
    assert type(total.grad_fn).__name__ != "_GhostSumsBackward"
    with pytest.raises(ValueError, match="at most 15 tokens, found 17"):
        y, weights = torch.randn(1, 30, 4), native.GhostWeights(torch.randn(1, 17, 4), torch.randn(1, 4))
        in_training.ghost_gradient(y, y, None, weights)


@pytest.mark.parametrize("columns", [1, 15, 16, 33, 130])
def test_softmax_codes_and_gradient(level, columns):  # noqa: ARG001
    scores, nothing, dropped = (
        4 * torch.randn(3, 7, columns),
        in_training.Dropout(0, 0.0),
        in_training.Dropout(2**63 + 11, 0.3),
    )
    scores[1, :, columns // 2 + 1 :] += torch.finfo(torch.float32).min
    expected, codes, scale = softmax_codes(scores, 8, False, None)
    found = in_training.softmax_codes(scores, 8, nothing)
    torch.testing.assert_close(found[0], expected, atol=1e-30, rtol=1e-6)
    assert torch.equal(found[1], codes) and torch.equal(found[2], scale)
    kept = in_training.drop(torch.ones_like(scores), dropped)
    found = in_training.softmax_codes(scores, 8, dropped)
    assert torch.equal(found[1], codes * kept.sign()) and torch.equal(found[2], scale * (1 / (1 - 0.3)))
    leaf, gradient = scores.clone().requires_grad_(), torch.randn_like(scores)
    (torch.softmax(leaf, -1) * kept).backward(gradient)
    torch.testing.assert_close(
        in_training.softmax_gradient(gradient, found[0], dropped), leaf.grad, atol=1e-6, rtol=1e-5
    )


def test_exponentials_round_to_torchs_floats(level):  # noqa: ARG001
    x = -20 * torch.rand(2**24, generator=torch.Generator().manual_seed(0))
    exact, infinity = x.double().exp(), torch.tensor(float("inf"))
    nearest = exact.float()
    beside = torch.stack([torch.nextafter(nearest, end) for end in (-infinity, infinity)])
    from_midpoint = ((beside.double() + nearest.double()) / 2 - exact).abs().amin(0) / exact
    hard = x[(from_midpoint < 2**-41) & (from_midpoint > 2**-50)]  # nearer, no two libraries need agree
    assert len(hard) > 100
    scores = torch.zeros(len(hard), 17)
    scores[:, 1:] = hard[:, None]
    expected, _, scale = softmax_codes(scores, 8, False, None)
    found, _, engine_scale = in_training.softmax_codes(scores, 8, in_training.Dropout(0, 0.0))
    assert torch.equal(found, expected) and torch.equal(engine_scale, scale)


@pytest.mark.parametrize("offsets", itertools.product((True, False), repeat=2))
def test_scaled_products(level, offsets):  # noqa: ARG001
    y, rows, columns = torch.randn(2, 3, 5, 37), torch.rand(2, 3, 5, 1), torch.rand(2, 1, 1, 37)
    a, b = (part if has else None for part, has in zip((torch.randn_like(rows), torch.randn(2, 3, 1, 1)), offsets))
    sums = torch.randn(2, 3, 5, 1), torch.randn(2, 3, 1, 37)
    expected = y * (rows * columns)
    expected = expected if b is None else expected + sums[0] * rows * b
    expected = expected if a is None else expected + a * sums[1]
    expected = expected if None in (a, b) else expected + 32 * a * b
    of_rows, of_columns = (rows, a, None if b is None else sums[0]), (columns, b, None if a is None else sums[1])
    assert torch.equal(in_training.scale_products(y.clone(), of_rows, of_columns, 32, 0.7), expected * 0.7)


@pytest.mark.parametrize("columns", [1, 16, 37])
@pytest.mark.parametrize("offset, bias", itertools.product((True, False), repeat=2))
@pytest.mark.parametrize("one", [True, False])
def test_finished_products(level, columns, offset, bias, one):  # noqa: ARG001
    products = torch.randint(-(2**30), 2**30, (5, columns), dtype=torch.int32)
    lines = torch.rand(1 if one else 5, 1), torch.randn(1 if one else 5, 1) if offset else None
    x = Quantized(torch.zeros(0), *lines)
    scale, sums = torch.rand(1, 1 if one else columns), torch.randn(1, columns) if offset else None
    bias = torch.randn(columns) if bias else None
    expected = ops.add_products(bias, [products.float()], x, [scale], sums)
    assert torch.equal(in_training.finish_products(products, x, scale, sums, bias), expected)


@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 37), (300, 64)])
@pytest.mark.parametrize("offset", [True, False])
def test_gradients_of_linear_layers(level, rows, columns, offset):  # noqa: ARG001
    gradient = torch.randn(rows, columns) * 10 ** torch.linspace(-40, 3, columns)
    special = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -float("inf"), float("nan")])
    gradient[0] = special.repeat(13)[:columns]
    x = Quantized(torch.zeros(0), torch.rand(rows, 1), torch.randn(rows, 1) if offset else None)
    scale, found = torch.rand(1, columns), []
    x.scale[0], scale[0, 0] = 1.0, 1.0  # halves between two numbers of bfloat16
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(in_training.linear_gradient(gradient, x, scale))
    torch.set_num_threads(1)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    for one, three in zip(*found):
        torch.testing.assert_close(one, three, **same)
    torch.testing.assert_close(found[0][0], (gradient * scale).bfloat16(), **same)
    torch.testing.assert_close(found[0][1], (gradient * x.scale).bfloat16(), **same)
    for sums, factor in zip(found[0][2:], (1.0, x.offset if offset else 0.0)):
        expected = (gradient.double() * factor).sum(0) if offset or factor else torch.zeros(columns).double()
        torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-3, equal_nan=True)


LEARNED = [name for name, quantizer in QUANTIZERS.items() if isinstance(quantizer, LsqQuantizer)]


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("shape", [(3, 1), (23, 47), (2, 3, 70, 16)])
def test_gradients_of_learned_steps(level, name, shape):  # noqa: ARG001
    x, quantizer = torch.randn(shape), QUANTIZERS[name]
    if name == "signs":
        quantizer.shift = torch.nn.Parameter(torch.randn(shape[-1]))
    x[0], gradient, found = 1e4, torch.randn(shape), []
    expected = quantizer.gradients(gradient.double(), x.double())
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(in_training.step_gradient(gradient, x, native.place_of(quantizer)))
    torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(*found))
    of_x, of_step, of_shift = found[0]
    assert torch.equal(of_x, quantizer.gradients(gradient, x)[0])
    torch.testing.assert_close(of_step * quantizer.gradient_scale, expected[1].float(), rtol=1e-4, atol=1e-4)
    if name == "signs":
        torch.testing.assert_close(of_shift, expected[2].float(), rtol=1e-4, atol=1e-4)
    if name != "signs":  # as torch: a number below 0 or not
        x.view(-1)[0] = float("nan")
        assert in_training.step_gradient(gradient, x, native.place_of(quantizer))[1].isnan()


@pytest.mark.parametrize("name", LEARNED)
def test_learned_rows_are_those_of_torch(level, name, monkeypatch):  # noqa: ARG001
    quantizer, found = QUANTIZERS[name], []
    quantizer.ready = True
    if name == "signs":
        quantizer.shift = torch.nn.Parameter(torch.randn(47))
    given = numbers(23, 47)
    for engine in (True, False):
        x = given.clone().requires_grad_()
        if not engine:
            monkeypatch.setattr(ops, "drop", None)
            assert ops.quantize_rows(x, quantizer, None) is None
        carrier, quantized = _quantize_input(x, quantizer, None)
        quantizer.zero_grad()
        carrier.sum().backward()
        found.append((*quantized, x.grad, quantizer.step.grad))
    for one, two in zip(*[parts[:-1] for parts in found]):
        assert (one is None and two is None) or torch.equal(one, two)
    torch.testing.assert_close(found[0][-1], found[1][-1], rtol=1e-4, atol=1e-4)


def test_dropout_is_that_of_every_path_and_random(level):
    x, dropped = torch.randn(40, 1000), in_training.Dropout(2**64 - 3, 0.5)
    y = in_training.drop(x, dropped)
    native.set_level("scalar")
    assert torch.equal(y, in_training.drop(x, dropped))
    native.set_level(level)
    signs = (in_training.drop(torch.ones(1000, 1024), dropped) - 1).double()
    assert abs(float(signs.mean())) < 5e-3  # five standard deviations
    for shift in (1, 2, 16, 512):  # neighbours in a row, rows, and the same places of another seed
        assert abs(float((signs * signs.roll(shift, 1)).mean())) < 5e-3
        assert abs(float((signs * signs.roll(shift, 0)).mean())) < 5e-3
        other = in_training.drop(torch.ones(1000, 1024), in_training.Dropout(shift, 0.5)) - 1
        assert abs(float((signs * other).mean())) < 5e-3
