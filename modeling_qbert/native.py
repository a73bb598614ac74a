"""The native CPU engine (`native/` of the repository) through ctypes; `native_training` calls it as well, no other.

Importing this module raises `ImportError` where the engine was not built, does not fit or would be slow; `ops.py` then
stays in torch. `QBERT_CPU` caps the instructions used (`scalar`, plain loops for tests, `avx2`, `vnni`, `avx512`; on
Arm `scalar`, `neon`), `off` does without the engine; every path gives the same bits.

Shapes: N rows, O out rows, I in columns, P planes, G groups, B batch, T tokens, C hidden, D head dim, F ghost features
of k tokens.
"""

import ctypes
import importlib.util
import math
import os
import platform
import weakref
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from .packing import packed_columns as row_bytes
from .quantizers import MIN_STEP, InputQuantizer, LsqQuantizer, PactQuantizer


VERSION = 11  # of the C interface
LEVELS = ("scalar", "neon") if platform.machine() in ("aarch64", "arm64") else ("scalar", "avx2", "vnni", "avx512")
LAYOUTS = {"2bit": 0, "dense": 1, "int8": 2, "1bit": 3}
FUNCTIONS = {"gelu": 0, "relu": 1}
OUT_OF_TABLE, HIDDEN_START = -2, -3  # answers of `qb_encoder_forward` that torch can explain better

_DROPOUT = [c_uint64, c_uint32, c_float]
_SIGNATURES = {
    "qb_version": (c_int, []),
    "qb_best_level": (c_int, []),
    "qb_level": (c_int, []),
    "qb_set_level": (None, [c_int]),
    "qb_use_openmp": (None, [c_void_p] * 3),
    "qb_weight_new": (c_void_p, [c_int, c_void_p, *[c_int64] * 5, c_void_p, c_void_p]),
    "qb_weight_free": (None, [c_void_p]),
    "qb_weight_rows": (c_int, [c_void_p, c_int, *[c_int64] * 4, c_void_p]),
    "qb_sums": (c_int, [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p]),
    "qb_linear": (c_int, [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int]),
    "qb_quantize": (c_int, [c_void_p, c_void_p, c_int64, c_int64, *[c_void_p] * 5, c_int]),
    "qb_dense": (c_int, [*[c_void_p] * 4, c_int64, c_int64, c_void_p, c_int]),
    "qb_gelu": (None, [c_void_p, c_int64, c_int64]),
    "qb_layer_norm": (c_int, [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_float]),
    "qb_attention": (c_int, [*[c_void_p] * 3, c_int64, c_int64, c_float, *[c_void_p] * 3]),
    "qb_ghosts": (c_int, [c_void_p, c_void_p, *[c_int64] * 5, *[c_void_p] * 3, c_int]),
    "qb_ghost_gradient": (None, [*[c_void_p] * 3, *[c_int64] * 5, *[c_void_p] * 5, c_int]),
    "qb_dropout": (None, [c_void_p, c_int64, c_int64, *_DROPOUT, c_void_p, c_int]),
    "qb_scale": (None, [c_void_p, *[c_int64] * 3, c_void_p, c_void_p, c_float, c_float, c_int]),
    "qb_finish": (None, [c_void_p, c_int64, c_int64, *[c_void_p] * 6, c_int]),
    "qb_linear_gradient": (c_int, [c_void_p, c_int64, c_int64, *[c_void_p] * 7, c_int]),
    "qb_step_gradient": (c_int, [*[c_void_p] * 3, c_int64, c_int64, *[c_float] * 4, *[c_void_p] * 3, c_int]),
    "qb_softmax_codes": (None, [c_void_p, c_int64, c_int64, c_float, *_DROPOUT, *[c_void_p] * 3, c_int]),
    "qb_softmax_gradient": (None, [c_void_p, c_void_p, c_int64, c_int64, *_DROPOUT, c_void_p, c_int]),
    "qb_encoder_new": (c_void_p, [*[c_int64] * 5, c_int, c_float]),
    "qb_encoder_free": (None, [c_void_p]),
    "qb_encoder_layer": (c_int, [c_void_p, c_int64, *[c_void_p] * 10, c_float]),
    "qb_encoder_ghosts": (c_int, [c_void_p, c_int64, c_int, c_int64, c_int64, c_void_p, c_void_p]),
    "qb_encoder_embedding": (c_int, [c_void_p, c_int, *[c_void_p] * 7, c_float]),
    "qb_encoder_forward": (c_int, [c_void_p, c_int64, c_int64, *[c_void_p] * 5, c_int64, c_void_p, c_int]),
}


def _load() -> ctypes.CDLL:
    if os.environ.get("QBERT_CPU", "scalar") not in (*LEVELS, "off"):
        raise ValueError(f"environment variable QBERT_CPU must be one of {(*LEVELS, 'off')}")
    if os.environ.get("QBERT_CPU") == "off":
        raise ImportError("switched off by QBERT_CPU=off")
    spec = importlib.util.find_spec(f"{__package__}._engine")
    if spec is None or spec.origin is None:
        if __package__.startswith("transformers_modules"):
            raise ImportError("the code that comes with a checkpoint has no engine; install the package for its speed")
        raise ImportError("not built: no suitable C++ compiler was found when the package was installed")
    try:
        library = ctypes.CDLL(spec.origin)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise ImportError(f"{spec.origin} cannot be used: {error}") from error
    if library.qb_version() != VERSION:
        raise ImportError(f"{spec.origin} has interface version {library.qb_version()}, expected {VERSION}")
    if library.qb_best_level() == 0 and os.environ.get("QBERT_CPU") != "scalar":
        raise ImportError(f"plain torch is faster: this CPU has none of {', '.join(LEVELS[1:])}")
    return library


library = _load()
same_bytes = library.memcmp  # 0 for equal ones
same_bytes.restype, same_bytes.argtypes = c_int, [c_void_p, c_void_p, ctypes.c_size_t]


def _share_threads_with_torch() -> None:
    """Hand the engine the OpenMP runtime that torch has loaded; where none is found it has threads of its own."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            files = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    except OSError:
        return
    packages = os.path.dirname(os.path.dirname(torch.__file__))  # torch's own copy lies in torch/lib or torch.libs
    names = ("libgomp", "libiomp5", "libomp")
    found = [path for path in files if os.path.basename(path).startswith(names)]
    for path in sorted(found, key=lambda path: not path.startswith(packages)):
        try:
            runtime = ctypes.CDLL(path)
            functions = [runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads]
        except (OSError, AttributeError):
            continue
        library.qb_use_openmp(*(ctypes.cast(function, c_void_p) for function in functions))
        return


_share_threads_with_torch()


def _after_fork() -> None:
    """The engine starts threads of its own in a forked child, but torch's OpenMP threads are gone for good: with more
    than one of them the next large or transcendental operator of torch would wait for ever."""
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)


def level() -> str:
    """The instructions in use, one of `LEVELS`."""
    return LEVELS[library.qb_level()]


def set_level(name: str) -> str:
    """Use instructions up to `name`, within this CPU's and `QBERT_CPU`'s; returns the level in use."""
    library.qb_set_level(LEVELS.index(name))
    return level()


def address_of(tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> int | None:
    """Address of a contiguous CPU tensor of this type and shape; anything else must never reach native code."""
    if tensor is None:
        return None
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous CPU tensor of {dtype}, found {tensor.dtype} on {tensor.device}")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"expected a tensor of shape {list(shape)}, found {list(tensor.shape)}")
    return tensor.data_ptr()


def floats(*shape: int) -> Tensor:
    """Room for an answer, whatever torch's default type and device are: Transformers changes them, for all threads,
    while it loads a model."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def check(status: int) -> None:
    if status:
        raise MemoryError("the native engine ran out of memory")


class Place(NamedTuple):
    """How the numbers of one place become codes: a range within clips, a fixed step above a floor, or signs."""

    bits: int
    kind: int  # 0 asymmetric range, 1 symmetric range, 2 fixed step, 3 signs
    clip_low: float = -math.inf
    clip_high: float = math.inf
    step: float = 1.0
    floor: float = 0.0
    least: int = 0
    most: int = 0
    less: int = 0  # taken off a code so that it fits int8
    shift: Tensor | None = None  # of signs: float32, what each column is compared with


Parts = tuple[int, int, float, int, int, int, Tensor | None, Tensor | None, Tensor | None]


def parts_of_place(quantizer: InputQuantizer, signed: bool = True) -> Parts:
    """What `filled_place` takes: numbers that the form of a quantizer gives, then its learned tensors, unread."""
    if isinstance(quantizer, LsqQuantizer):
        if quantizer.signs:
            return 1, 3, 0.0, 0, 0, 0, quantizer.step, None, quantizer.shift
        less = 128 if signed and quantizer.most > 127 else 0
        bits = (quantizer.most - quantizer.least).bit_length()
        return bits, 2, quantizer.low or 0.0, quantizer.least, quantizer.most, less, quantizer.step, None, None
    if isinstance(quantizer, PactQuantizer):
        return *parts_of_place(quantizer.dynamic)[:7], quantizer.clip, None
    return quantizer.bits, int(quantizer.symmetric), 0.0, 0, 0, 0, None, None, None


def filled_place(
    bits: int,
    kind: int,
    floor: float,
    least: int,
    most: int,
    less: int,
    step: Tensor | None,
    clip: Tensor | None,
    shift: Tensor | None,
) -> Place:
    """The place with the values that its tensors have now."""
    low, high = (-math.inf, math.inf) if clip is None else clip.detach().tolist()
    size = 1.0 if step is None else float(step.detach().clamp_min(MIN_STEP))
    return Place(bits, kind, low, high, size, floor, least, most, less, None if shift is None else shift.detach())


def place_of(quantizer: InputQuantizer, signed: bool = True) -> Place:
    """The engine's form of a quantizer; codes of probabilities stay unsigned (`signed` False)."""
    return filled_place(*parts_of_place(quantizer, signed))


def _places(places: Sequence[Place], columns: Sequence[int]) -> tuple[ctypes.Array, ctypes.Array]:
    """Numbers of places and addresses of their shifts, one for each column."""
    numbers = [number for place in places for number in place[:-1]]
    shifts = [address_of(place.shift, torch.float32, (count,)) for place, count in zip(places, columns, strict=True)]
    return (c_double * len(numbers))(*numbers), (c_void_p * len(shifts))(*shifts)


class NativeWeight:
    """One packed weight in the engine's layout, still packed.

    Args:
        packed: uint8 (P, O, bytes) in one of `LAYOUTS`, of one plane or two.
        columns: I.
        scale: float32 (P, O, G); group_size columns share one if G > 1, then a multiple of 16 (of 32 for 1 bit).
        bias: float32 (O) or None.
    """

    def __init__(self, packed: Tensor, columns: int, layout: str, scale: Tensor, group_size: int, bias: Tensor | None):
        planes, rows, width = packed.shape
        groups = scale.shape[2]
        if width != row_bytes(columns, layout) or planes not in (1, 2) or 0 in (rows, columns):
            expected = row_bytes(columns, layout)
            raise ValueError(f"a {layout} row of {columns} codes has {expected} bytes, found {list(packed.shape)}")
        if groups > 1 and (not supports(layout, groups, group_size) or -(-columns // group_size) != groups):
            raise ValueError(f"{groups} groups of {group_size} columns do not fit {columns} columns of {layout}")
        self.planes, self.rows, self.columns, self.groups, self.layout = planes, rows, columns, groups, layout
        self.handle = library.qb_weight_new(
            LAYOUTS[layout],
            address_of(packed, torch.uint8),
            rows,
            columns,
            planes,
            groups,
            group_size if groups > 1 else columns,
            address_of(scale, torch.float32, (planes, rows, groups)),
            address_of(bias, torch.float32, (rows,)),
        )
        if not self.handle:
            raise MemoryError("the native engine ran out of memory")
        self._free = weakref.finalize(self, library.qb_weight_free, self.handle)
        self._free.atexit = False  # daemon threads may still be inside

    def __reduce__(self):
        return _nothing, ()

    def release(self, owner: object) -> int:
        """The handle, for an owner that frees it and lives as long as this object."""
        self._free.detach()
        self.owner = owner
        return self.handle

    def packed(self, first: int, rows: int, run: int, step: int) -> Tensor:
        """Rows from `first` on as they were given, in runs of `run` that begin `step` rows apart: uint8 (P, rows,
        bytes), or (rows, bytes) of one plane."""
        if first < 0 or rows < 1 or first + (rows - 1) // run * step + (rows - 1) % run >= self.rows:
            raise ValueError(f"a weight of {self.rows} rows has no {rows} rows from {first} on, {run} every {step}")
        row = row_bytes(self.columns, self.layout)
        shape = (rows, row) if self.planes == 1 else (self.planes, rows, row)
        with torch.inference_mode(False):  # the tensor outlives the call
            packed = torch.empty(shape, dtype=torch.uint8, device="cpu")
        sizes = (first, rows, run, step)
        check(library.qb_weight_rows(self.handle, LAYOUTS[self.layout], *sizes, packed.data_ptr()))
        return packed

    def sums(self, x: Tensor, plane: int = 0, group: int = 0) -> Tensor:
        """Exact products of int8 codes (N, I) with the codes of one plane and group: int32 (N, O)."""
        out = torch.empty(x.shape[0], self.rows, dtype=torch.int32, device="cpu")
        address = address_of(x, torch.int8, (x.shape[0], self.columns))
        check(library.qb_sums(self.handle, plane, group, address, x.shape[0], out.data_ptr()))
        return out

    def linear(self, x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """`ops.linear_codes` of int8 codes (N, I) with scale and offset (N, 1): float32 (N, O)."""
        rows = x.shape[0]
        y = floats(rows, self.rows)
        inputs = address_of(x, torch.int8, (rows, self.columns))
        scales = [address_of(part, torch.float32, (rows, 1)) for part in (scale, offset)]
        check(library.qb_linear(self.handle, inputs, *scales, rows, y.data_ptr(), torch.get_num_threads()))
        return y


class NativeDense:
    """A weight with the place where its input becomes codes."""

    def __init__(self, weight: NativeWeight, place: Place):
        self.weight, self.place = weight, place
        self.numbers = _places([place], [weight.columns])

    def __call__(self, x: Tensor, threads: int = 1) -> Tensor:
        """float32 (N, O) of the first tokens of a contiguous float32 (N, T, I)."""
        rows, tokens, columns = x.shape
        y = floats(rows, self.weight.rows)
        address = address_of(x, torch.float32, (rows, tokens, self.weight.columns))
        sizes = (address, tokens * columns, rows, y.data_ptr(), threads)
        check(library.qb_dense(self.weight.handle, *self.numbers, *sizes))
        return y


def supports(layout: str, groups: int = 1, group_size: int = 0) -> bool:
    """Whether the engine has this layout, and scales shared by groups of this size."""
    return layout in LAYOUTS and (groups == 1 or group_size % (32 if layout == "1bit" else 16) == 0)


def quantize(x: Tensor, place: Place, real: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of float32 (N, I): int8 codes, scale and offset (N, 1). Rows where the bool `real` (N,) is False have a
    range of 0, as `quantizers` has it."""
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    scale, offset = floats(x.shape[0], 1), floats(x.shape[0], 1)
    inputs = (address_of(x, torch.float32), address_of(real, torch.bool, x.shape[:1]), *x.shape)
    outputs = (codes.data_ptr(), scale.data_ptr(), offset.data_ptr(), torch.get_num_threads())
    check(library.qb_quantize(*inputs, *_places([place], x.shape[1:]), *outputs))
    return codes, scale, offset


def gelu(x: Tensor) -> Tensor:
    """`ops.gelu` of float32 (N, I)."""
    y = x.clone()
    library.qb_gelu(address_of(y, torch.float32), *y.shape)
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """`ops.layer_norm` of float32 (N, C)."""
    y = x.clone()
    parts = [address_of(part, torch.float32, x.shape[1:]) for part in (weight, bias)]
    check(library.qb_layer_norm(address_of(y, torch.float32), *y.shape, *parts, epsilon))
    return y


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, places: Sequence[Place]) -> Tensor:
    """Quantized attention of one head of one sentence, float32 (T, D) each; places of the three and probabilities."""
    context = torch.empty_like(query)
    inputs = [address_of(part, torch.float32, query.shape) for part in (query, key, value)]
    of_places = _places(places, [query.shape[1]] * 3 + [0])
    check(library.qb_attention(*inputs, *query.shape, scaling, *of_places, context.data_ptr()))
    return context


class GhostWeights(NamedTuple):
    """Ghost features with ReLU: kernels float32 (F, k, C) and factors (F, C)."""

    kernels: Tensor
    scale: Tensor


class LayerWeights(NamedTuple):
    """One encoder layer: places where numbers become codes (input, query, key, value, probabilities, context, hidden,
    feed-forward), weights of query, key and value of each head, attention output, up and down, two LayerNorms, and the
    ghost features after the attention and the feed-forward output."""

    places: Sequence[Place]
    query_key_value: NativeWeight
    output: NativeWeight
    up: NativeWeight
    down: NativeWeight
    attention_norm: tuple[Tensor, Tensor]
    output_norm: tuple[Tensor, Tensor]
    ghosts: tuple[GhostWeights | None, GhostWeights | None] = (None, None)


class EmbeddingTables(NamedTuple):
    """Packed word embedding uint8 (P, V, bytes), scale (P, 1 or V, G), float types and positions, LayerNorm.

    `padding` is the id that positions do not count, -1 if they count every token from 0.
    """

    words: Tensor
    layout: str
    scale: Tensor
    group_size: int
    types: Tensor
    positions: Tensor
    norm: tuple[Tensor, Tensor]
    padding: int


class NativeEncoder:
    """Encoder layers, and the embedding before them if given, as one call."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        hidden: int,
        heads: int,
        head_size: int,
        intermediate: int,
        function: str,
        epsilon: float,
        embedding: EmbeddingTables | None = None,
    ):
        self.hidden = hidden
        self.handle = library.qb_encoder_new(
            len(layers), hidden, heads, head_size, intermediate, FUNCTIONS[function], head_size**-0.5
        )
        if not self.handle:
            raise MemoryError("the native engine ran out of memory")
        free = weakref.finalize(self, library.qb_encoder_free, self.handle)
        free.atexit = False  # daemon threads may still be inside
        shapes = {
            "query_key_value": (3 * heads * head_size, hidden),
            "output": (hidden, heads * head_size),
            "up": (intermediate, hidden),
            "down": (hidden, intermediate),
        }
        for index, layer in enumerate(layers):
            weights = [getattr(layer, name) for name in shapes]
            for weight, (name, shape) in zip(weights, shapes.items()):
                if (weight.rows, weight.columns) != shape:
                    found = [weight.rows, weight.columns]
                    raise ValueError(f"layer {index}: {name} must be {list(shape)}, found {found}")
            columns = (hidden, head_size, head_size, head_size, 0, heads * head_size, hidden, intermediate)
            places = _places(layer.places, columns)
            norms = [
                address_of(part, torch.float32, (hidden,)) for part in (*layer.attention_norm, *layer.output_norm)
            ]
            handles = [weight.release(self) for weight in weights]
            check(library.qb_encoder_layer(self.handle, index, *places, *handles, *norms, epsilon))
            for after, ghosts in enumerate(layer.ghosts):
                if ghosts is not None:
                    features, size, _ = ghosts.kernels.shape
                    kernels = address_of(ghosts.kernels, torch.float32, (features, size, hidden))
                    scale = address_of(ghosts.scale, torch.float32, (features, hidden))
                    check(library.qb_encoder_ghosts(self.handle, index, after, features, size, kernels, scale))
        self.tables = embedding  # the engine reads their memory
        if embedding is not None:
            tables = (embedding.types, embedding.positions)
            planes, rows, _ = embedding.words.shape
            _, scale_rows, groups = embedding.scale.shape
            group_size = embedding.group_size if groups > 1 else hidden
            sizes = (rows, scale_rows, groups, group_size, *(table.shape[0] for table in tables), planes)
            check(
                library.qb_encoder_embedding(
                    self.handle,
                    LAYOUTS[embedding.layout],
                    address_of(embedding.words, torch.uint8, (planes, rows, row_bytes(hidden, embedding.layout))),
                    address_of(embedding.scale, torch.float32, (planes, scale_rows, groups)),
                    (c_int64 * len(sizes))(*sizes),
                    *[address_of(table, torch.float32, (table.shape[0], hidden)) for table in tables],
                    *[address_of(part, torch.float32, (hidden,)) for part in embedding.norm],
                    epsilon,
                )
            )

    def __reduce__(self):
        return _nothing, ()  # a copy of a model makes an engine of its own

    def __call__(
        self,
        mask: Tensor | None,
        embedded: Tensor | None = None,
        words: Tensor | None = None,
        types: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor | None:
        """Last hidden state (B, T, C), 0 where the bool `mask` (B, T) is False; None where torch has to answer or to
        complain: an id without a row in its table, or a sentence whose first token is masked.

        Args:
            embedded: float32 (B, T, C), or None and the tokens themselves:
            words, types, positions: int64 (B, T); types None are 0, positions None are counted.
        """
        shape = (words if embedded is None else embedded).shape[:2]
        output = floats(*shape, self.hidden)
        status = library.qb_encoder_forward(
            self.handle,
            *shape,
            address_of(mask, torch.bool, shape),
            address_of(embedded, torch.float32, (*shape, self.hidden)),
            address_of(words, torch.int64, shape),
            address_of(types, torch.int64, shape),
            address_of(positions, torch.int64, shape),
            -1 if self.tables is None else self.tables.padding,
            output.data_ptr(),
            torch.get_num_threads(),
        )
        if status in (OUT_OF_TABLE, HIDDEN_START):
            return None
        check(status)
        return output


def _nothing() -> None:
    return None
