"""Nothing outside the buffers that the C interface is given is read or written: each lies against a forbidden page."""

import os
import sys

import pytest
import torch


HERE = os.path.dirname(__file__)
sys.path[:0] = [HERE, os.path.join(HERE, "..", "modeling")]

from guarded import Guarded  # noqa: E402
from test_steps import QUANTIZERS  # noqa: E402
from tiny import BACKBONE_SIZES, latent  # noqa: E402

from modeling_qbert import native, ops  # noqa: E402
from modeling_qbert import native_training as in_training  # noqa: E402
from modeling_qbert.packing import pack_codes  # noqa: E402
from modeling_qbert.quantizers import TINY, ActivationQuantizer, Quantized  # noqa: E402


pytestmark = pytest.mark.parametrize("front", [False, True], ids=["behind", "before"])


class Fence:
    """Copies of tensors against forbidden pages, alive as long as this."""

    def __init__(self, front: bool):
        self.front, self.kept = front, []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.kept.append(Guarded(tensor, self.front))
        return self.kept[-1].tensor()

    def empty(self, *shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
        return self(torch.zeros(*shape, dtype=dtype, device=device))


@pytest.fixture
def fence(front, monkeypatch):
    """Buffers that native.py makes for answers are fenced too."""
    fence = Fence(front)
    shim = type("Torch", (), {"__getattr__": lambda _, name: getattr(torch, name)})()
    shim.empty = fence.empty
    shim.empty_like = lambda tensor: fence.empty(*tensor.shape, dtype=tensor.dtype)
    monkeypatch.setattr(native, "torch", shim)
    monkeypatch.setattr(in_training, "torch", shim)
    return fence


SIZES = (1, 15, 16, 47, 130)


@pytest.mark.parametrize("columns", SIZES)
def test_quantize(level, fence, columns):  # noqa: ARG001
    x = torch.randn(3, columns)
    for name, quantizer in QUANTIZERS.items():
        place = native.place_of(quantizer)
        if name == "signs":
            place = place._replace(shift=fence(torch.randn(columns)))
        found = native.quantize(fence(x), place)
        assert all(torch.equal(one, two) for one, two in zip(found, native.quantize(x, place)))
    real = torch.tensor([True, False, True])
    found = native.quantize(fence(x), native.place_of(ActivationQuantizer(8, False, False)), fence(real))
    assert found[2][1] == 0.5 * 256 * TINY / 255  # a range of 0


@pytest.mark.parametrize("columns", SIZES)
def test_float_steps(level, fence, columns):  # noqa: ARG001
    x, weight, bias = torch.randn(4, columns), torch.randn(columns), torch.randn(columns)
    y = fence(x)
    native.library.qb_gelu(y.data_ptr(), 4, columns)
    assert torch.equal(y, ops.gelu(x))
    y, parts = fence(x), [fence(weight).data_ptr(), fence(bias).data_ptr()]
    assert native.library.qb_layer_norm(y.data_ptr(), 4, columns, *parts, 1e-12) == 0
    assert torch.equal(y, ops.layer_norm(x, weight, bias, 1e-12))
    codes = torch.randint(-1, 2, (1, 17, columns), dtype=torch.int8)
    packed, scale = fence(pack_codes(codes, "dense")), fence(torch.rand(1, 17, 1))
    made = native.NativeWeight(packed, columns, "dense", scale, columns, fence(torch.randn(17)))
    dense = native.NativeDense(made, native.place_of(QUANTIZERS["8 bits, asymmetric"]))
    for threads in (1, 2):
        expected = dense(x.unsqueeze(1), 1)
        assert torch.equal(dense(fence(x).unsqueeze(1), threads), expected)


@pytest.mark.parametrize("tokens, size", [(1, 1), (7, 15), (17, 20), (33, 64)])
def test_attention(level, fence, tokens, size):  # noqa: ARG001
    parts = [torch.randn(tokens, size) for _ in range(3)]
    places = [native.place_of(QUANTIZERS["8 bits, asymmetric"], signed) for signed in (True, True, True, False)]
    found = native.attention(*map(fence, parts), 0.3, places)
    assert torch.equal(found, native.attention(*parts, 0.3, places))


@pytest.mark.parametrize("columns", SIZES)
def test_steps_of_training(level, fence, columns):  # noqa: ARG001
    x, gradient, dropout = torch.randn(2, 3, columns), torch.randn(2, 3, columns), in_training.Dropout(7, 0.3)
    found = in_training.drop(fence(x), dropout), *in_training.softmax_codes(fence(x), 8, dropout)
    expected = in_training.drop(x, dropout), *in_training.softmax_codes(x, 8, dropout)
    found += (in_training.softmax_gradient(fence(gradient), fence(expected[1]), dropout),)
    expected += (in_training.softmax_gradient(gradient, expected[1], dropout),)
    of_rows = [torch.randn(2, 3, 1) for _ in range(3)]
    of_columns = [torch.randn(2, 1, columns) for _ in range(3)]
    found += (in_training.scale_products(fence(x), [*map(fence, of_rows)], [*map(fence, of_columns)], 5, 0.3),)
    expected += (in_training.scale_products(x.clone(), of_rows, of_columns, 5, 0.3),)
    products = torch.randint(-99, 99, (3, columns), dtype=torch.int32)
    lines = [torch.rand(3, 1), torch.rand(3, 1)], [torch.rand(1, columns), torch.rand(1, columns), torch.rand(columns)]
    fenced = Quantized(x, *map(fence, lines[0])), map(fence, lines[1])
    found += (in_training.finish_products(fence(products), fenced[0], *fenced[1]),)
    expected += (in_training.finish_products(products, Quantized(x, *lines[0]), *lines[1]),)
    found += in_training.linear_gradient(fence(gradient[0]), fenced[0], fence(lines[1][0]))
    expected += in_training.linear_gradient(gradient[0], Quantized(x, *lines[0]), lines[1][0])
    shift = torch.randn(columns)
    for name in ("signs", "lsq 4 above"):
        place = native.place_of(QUANTIZERS[name])._replace(shift=shift if name == "signs" else None)
        expected += in_training.step_gradient(gradient[0], x[0], place)
        place = place._replace(shift=fence(shift) if name == "signs" else None)
        found += in_training.step_gradient(fence(gradient[0]), fence(x[0]), place)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("columns", SIZES)
def test_ghost_features(level, fence, columns):  # noqa: ARG001
    y, real = torch.randn(2, 9, columns), torch.rand(2, 9) < 0.7
    rows, places = y[real], real.flatten().nonzero().flatten()
    kernels, scale = torch.randn(2, 5, columns), torch.randn(2, columns)
    out = fence.empty(*rows.shape)
    addresses = [fence(part).data_ptr() for part in (kernels, scale)]
    sizes = (len(places), 9, columns, 2, 5)
    inputs = (fence(rows).data_ptr(), fence(places).data_ptr())
    assert native.library.qb_ghosts(*inputs, *sizes, *addresses, out.data_ptr(), 2) == 0
    assert torch.equal(out, in_training.ghost_features(y, real, native.GhostWeights(kernels, scale))[real])


@pytest.mark.parametrize("columns", SIZES)
def test_ghost_gradient(level, fence, columns):  # noqa: ARG001
    y, gradient, real = torch.randn(2, 9, columns), torch.randn(2, 9, columns), torch.rand(2, 9) < 0.7
    weights = native.GhostWeights(torch.randn(2, 5, columns), torch.randn(2, columns))
    expected = in_training.ghost_gradient(gradient, y, real, weights)
    found = [fence(part) for part in (gradient, torch.zeros_like(weights.kernels), torch.zeros_like(weights.scale))]
    inputs = [fence(part).data_ptr() for part in (gradient, y, real)]
    addresses = [part.data_ptr() for part in (*map(fence, weights), *found)]
    native.library.qb_ghost_gradient(*inputs, 2, 9, columns, 2, 5, *addresses, 2)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


MODELS = [
    ("bert", "ternary", {}),
    ("roberta", "binary", {"bits": "1-1-4", "activation_quantizer": "lsq"}),
    ("bert", "binary", {"bits": "1-1-1", "activation_quantizer": "lsq"}),
    ("bert", "binary", {"bits": "1-1-8", "planes": 2}),
    ("bert", "ternary", {"bits": "8-8-8", "embedding_granularity": "per_group", "group_size": 16}),
    ("roberta", "ghost", {"bits": "2-2-8", "ghost_features": 2}),
    ("electra", "ghost", {"bits": "1-1-8", "ghost_features": 1, "ghost_kernel_size": 5}),
]


@pytest.mark.parametrize("backbone, family, fields", MODELS, ids=[f"{m[1]}-{m[0]}" for m in MODELS])
def test_encoder(level, fence, backbone, family, fields):  # noqa: ARG001
    """Every tensor of a model, and its inputs and outputs, from the embedding's rows to the last hidden state."""
    assert backbone != "electra" or backbone in BACKBONE_SIZES  # whose embeddings torch projects
    model = latent(backbone, "base", family=family, **fields).pack()
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(0, 97, (5, 13), generator=generator), torch.rand(5, 13, generator=generator) < 0.7
    ids[0, 0], mask[:, 0] = 96, True  # the last row of a table that ends at a page nobody may touch
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)[0]
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None and tensor.dtype != torch.int64:
                        kept = fence(tensor)
                        store[name] = torch.nn.Parameter(kept, False) if name in module._parameters else kept
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = model(fence(ids), attention_mask=fence(mask))[0]
            engine = model._fused_engine
            assert engine.encoder is not None and torch.equal(found, expected)
            if engine.encoder.tables is not None:
                words = model.embeddings.word_embeddings.weight
                assert engine.encoder.tables.words.data_ptr() == words.data_ptr()  # read in place
