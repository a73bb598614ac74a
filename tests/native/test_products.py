"""Products of codes on every path against plain integers. `QBERT_CASES` sets how many random cases each path gets."""

import ctypes
import os
import sys

import numpy as np
import pytest
import torch


sys.path.insert(0, os.path.dirname(__file__))

from guarded import Guarded  # noqa: E402

from modeling_qbert import native, ops  # noqa: E402
from modeling_qbert.packing import pack_codes  # noqa: E402
from modeling_qbert.quantizers import Quantized  # noqa: E402


CASES = int(os.environ.get("QBERT_CASES", "200"))
BOUNDS = {"1bit": 1, "2bit": 1, "dense": 1, "int8": 127}


def random_codes(generator: np.random.Generator, layout: str, *shape: int) -> torch.Tensor:
    codes = generator.integers(-BOUNDS[layout], BOUNDS[layout] + 1, shape, dtype=np.int8)
    return torch.from_numpy(np.where(codes >= 0, 1, -1).astype(np.int8) if layout == "1bit" else codes)


def shifted(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """The same numbers at an address that is `by` elements off any alignment."""
    return torch.cat([tensor.new_zeros(by), tensor.flatten()])[by:].view(tensor.shape)


def random_case(generator: np.random.Generator) -> dict:
    """Sizes around those where a kernel changes its way: rows of 4, outputs of 16, columns of 16, 32 and 64."""
    layout = list(BOUNDS)[generator.integers(len(BOUNDS))]
    near = lambda step, most: max(1, int(step * generator.integers(0, most) + generator.integers(-2, 3)))  # noqa: E731
    group_size = int(generator.choice([32, 64]))
    return {
        "layout": layout,
        "rows": near(4, 4),
        "outputs": near(16, 8),
        "columns": near(int(generator.choice([1, 16, 32])), 8),
        "planes": int(generator.integers(1, 3)) if layout == "1bit" else 1,
        "group_size": group_size if generator.integers(3) == 0 else 0,
        "bits": int(generator.choice([0, 1, 2, 4, 8])),  # 0: -1 and +1
        "unsigned": bool(generator.integers(3) == 0),
        "shift": int(generator.integers(0, 64)),
        "threads": int(generator.integers(1, 4)),
    }


def check(generator: np.random.Generator, case: dict) -> None:
    rows, outputs, columns, planes = (case[name] for name in ("rows", "outputs", "columns", "planes"))
    codes = random_codes(generator, case["layout"], planes, outputs, columns)
    groups = -(-columns // case["group_size"]) if case["group_size"] else 1
    group_size = case["group_size"] if groups > 1 else columns
    least = 0 if case["unsigned"] and case["bits"] < 8 else -(2 ** (case["bits"] - 1))
    least, most = (least, least + 2 ** case["bits"] - 1) if case["bits"] else (-1, 1)
    x = generator.integers(least, most + 1, (rows, columns), dtype=np.int8)
    x = torch.from_numpy(x if case["bits"] else np.where(x > 0, 1, -1).astype(np.int8))
    x[generator.integers(rows)] = generator.choice([least, most])  # the extremes, where sums are largest
    scale = torch.from_numpy(generator.random((planes, outputs, groups), np.float32))
    bias = torch.from_numpy(generator.standard_normal(outputs, np.float32)) if generator.integers(2) else None
    packed = shifted(pack_codes(codes, case["layout"]), case["shift"])
    weight = native.NativeWeight(packed, columns, case["layout"], shifted(scale, case["shift"]), group_size, bias)
    x = shifted(x, case["shift"])
    for plane in range(planes):
        for group in range(groups):
            part = slice(group * group_size, (group + 1) * group_size)
            expected = x[:, part].numpy().astype(np.float64) @ codes[plane, :, part].numpy().astype(np.float64).T
            found = weight.sums(x, plane, group).numpy()
            assert np.array_equal(found, expected.astype(np.int32)), case  # exact in float64, and its BLAS is fast
    activation = Quantized(x, *(torch.from_numpy(generator.random((rows, 1), np.float32)) for _ in range(2)))
    torch.set_num_threads(case["threads"])
    flat = Quantized(codes.flatten(0, 1), scale.flatten(0, 1))
    expected = ops.linear_codes(activation, flat, bias, BOUNDS[case["layout"]], group_size, planes=planes)
    assert torch.equal(weight.linear(*activation), expected), case


def test_random_products(level):
    generator = np.random.default_rng(LEVEL_SEEDS[level])
    for _ in range(CASES):
        check(generator, random_case(generator))


LEVEL_SEEDS = {name: seed for seed, name in enumerate(native.LEVELS)}


@pytest.mark.parametrize("layout", BOUNDS)
@pytest.mark.parametrize("shape", [(8, 768, 768), (3, 2304, 768), (5, 768, 3072), (1, 1536, 384)])
def test_sizes_of_bert(level, layout, shape):
    if level == "scalar" and shape[0] > 3:
        pytest.skip("slow, and the same code as for the smaller sizes")
    rows, outputs, columns = shape
    generator = np.random.default_rng(0)
    case = {"layout": layout, "rows": rows, "outputs": outputs, "columns": columns, "planes": 1}
    for bits in (8, 4, 2, 1, 0) if level in ("avx2", "avx512") else (8,):
        check(generator, case | {"group_size": 0, "bits": bits, "unsigned": bits == 2, "shift": 1, "threads": 2})


RANGES = [(-128, 127), (-15, 15), (-8, 7), (0, 15), (-2, 1), (0, 3), (-1, 1), (0, 1)]


@pytest.mark.parametrize(("least", "most"), RANGES)
def test_largest_sums(level, least, most):  # noqa: ARG001
    """Sums in bytes and in 16 bits are widened before the deepest row of extremes can overflow them."""
    columns = 65_568
    for layout in BOUNDS:
        codes = torch.full((1, 3, columns), BOUNDS[layout], dtype=torch.int8)
        codes[:, 1] *= -1
        codes[:, 2, ::2] *= -1
        x = torch.full((3, columns), least, dtype=torch.int8)
        x[1] = most
        x[2, ::2] = most
        weight = native.NativeWeight(pack_codes(codes, layout), columns, layout, torch.ones(1, 3, 1), columns, None)
        assert torch.equal(weight.sums(x).double(), x.double() @ codes[0].double().T)


@pytest.mark.parametrize("layout", BOUNDS)
def test_nothing_outside_the_buffers_is_read_or_written(level, layout):  # noqa: ARG001
    generator = np.random.default_rng(1)
    for rows, outputs, columns in ((1, 1, 1), (3, 17, 33), (5, 49, 130), (4, 16, 64)):
        codes = random_codes(generator, layout, 1, outputs, columns)
        x = torch.from_numpy(generator.integers(-128, 128, (rows, columns), dtype=np.int8))
        tensors = [pack_codes(codes, layout), torch.ones(1, outputs, 1), torch.zeros(outputs), x]
        buffers = [Guarded(tensor) for tensor in (*tensors, torch.zeros(rows, outputs, dtype=torch.int32))]
        packed, scale, bias, codes_of_x, out = (buffer.address for buffer in buffers)
        library = native.library
        handle = library.qb_weight_new(native.LAYOUTS[layout], packed, outputs, columns, 1, 1, columns, scale, bias)
        assert library.qb_sums(handle, 0, 0, codes_of_x, rows, out) == 0
        library.qb_weight_free(handle)
        found = np.ctypeslib.as_array((ctypes.c_int32 * (rows * outputs)).from_address(out))
        assert np.array_equal(found.reshape(rows, outputs), x.numpy().astype(int) @ codes[0].numpy().astype(int).T)


def test_what_never_reaches_native_code():
    codes = torch.ones(1, 4, 40, dtype=torch.int8)
    packed, scale = pack_codes(codes, "2bit"), torch.ones(1, 4, 1)
    weight = native.NativeWeight(packed, 40, "2bit", scale, 40, None)
    x = torch.ones(3, 40, dtype=torch.int8)
    for wrong in (x.int(), x[:, :39], x.t().contiguous().t(), torch.ones(3, 80, dtype=torch.int8)[:, ::2]):
        with pytest.raises(ValueError, match="expected a"):
            weight.sums(wrong)
    for arguments in (
        (packed[:, :, 1:].contiguous(), 40, "2bit", scale, 40, None),
        (packed, 41, "2bit", scale, 40, None),
        (packed, 40, "2bit", scale[:, :3], 40, None),
        (packed, 40, "2bit", scale.double(), 40, None),
        (packed, 40, "2bit", torch.ones(1, 4, 4), 10, None),
        (packed, 40, "2bit", torch.ones(1, 4, 2), 16, None),
        (packed, 40, "2bit", scale, 40, torch.zeros(5)),
    ):
        with pytest.raises(ValueError):
            native.NativeWeight(*arguments)
