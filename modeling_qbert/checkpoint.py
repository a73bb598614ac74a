"""A packed checkpoint file: its header, its digests, and every check made before a tensor of it is used.

The file is a safetensors file. Its metadata holds, as strings: `qbert_format_version`, `qbert_packing`,
`qbert_architecture`, `qbert_config` (JSON of every config field that an answer depends on) and `qbert_sha256` (base85
of the SHA-256 of name, dtype, shape and bytes of each tensor, in the order of the tensors' names).
"""

import base64
import hashlib
import json
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .packing import FORMAT_VERSION, PACKINGS, find_invalid_code


WEIGHTS_FILE = "model.safetensors"
MAX_HEADER_BYTES = 4_000_000  # a packed BERT's header is some 40 kB
MAX_SCALE = 1e6  # a trained weight scale is below 1
QUANTIZER_STATE = ("weight_scale", "_quantizer.step", "_quantizer.shift", "_quantizer.clip")  # of a type of their own
MIN_SCALE = torch.finfo(torch.float32).tiny  # a denormal may count as 0 on some device
_ITEM_SIZE = {"U8": 1, "F32": 4, "BF16": 2, "F16": 2}
_DTYPE_NAMES = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class CheckpointError(ValueError):
    """A checkpoint that must not be used; the text names the file and the tensor or field, expected and found."""


class ShapeError(CheckpointError, RuntimeError):
    """Tensors of other shapes than the model's, for which Transformers' callers expect a RuntimeError."""


@dataclass(frozen=True)
class Expected:
    """What a model wants of one tensor; `columns` and `packing` are set for packed codes."""

    shape: tuple[int, ...]
    columns: int | None = None
    packing: str | None = None
    is_scale: bool = False
    dtype: torch.dtype | None = None  # None: any type of the file's other floats


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a file: dtype name of safetensors, shape, and byte range in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class PackedFile:
    """An open packed file whose structure has been checked; contents have not."""

    path: str
    metadata: dict[str, str]
    tensors: dict[str, TensorRecord]
    data: memoryview

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    @property
    def float_dtypes(self) -> set[torch.dtype]:
        """Types of the tensors that are neither codes nor scales."""
        return {
            _DTYPES[record.dtype]
            for name, record in self.tensors.items()
            if record.dtype != "U8" and not name.endswith(QUANTIZER_STATE)
        }

    def tensor(self, name: str) -> Tensor:
        """Copy of one tensor."""
        record = self.tensors[name]
        raw = bytearray(self.data[record.begin : record.end])
        if not raw:
            return torch.empty(record.shape, dtype=_DTYPES[record.dtype])
        return torch.frombuffer(raw, dtype=_DTYPES[record.dtype]).view(record.shape)

    def forget(self, name: str) -> None:
        """Give the pages of one tensor back to the system; reading it again brings them back from the file."""
        mapping, record = self.data.obj, self.tensors[name]
        if hasattr(mmap, "MADV_DONTNEED") and record.end > record.begin:
            start = len(mapping) - len(self.data)
            begin = (start + record.begin) // mmap.PAGESIZE * mmap.PAGESIZE
            mapping.madvise(mmap.MADV_DONTNEED, begin, start + record.end - begin)

    def json(self, key: str) -> dict[str, Any]:
        try:
            value = json.loads(self.metadata[key])
        except (ValueError, RecursionError) as error:
            raise self.fail(f"metadata field {key!r} is not JSON ({error})") from None
        if not isinstance(value, dict):
            raise self.fail(f"metadata field {key!r} must be a JSON object, found {type(value).__name__}")
        return value


def digest(name: str, dtype: str, shape: tuple[int, ...], data: Any) -> bytes:
    """SHA-256 over name, dtype, shape and bytes: two swapped tensors do not pass."""
    sha = hashlib.sha256(json.dumps([name, dtype, list(shape)]).encode())
    sha.update(data)
    return sha.digest()


def file_metadata(
    tensors: Mapping[str, Tensor], packing: str, architecture: str, compute_fields: dict[str, Any]
) -> dict[str, str]:
    """Metadata of a packed file that holds `tensors`."""
    digests = b""
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"tensor {name!r} must be of {sorted(_ITEM_SIZE)} to be saved, found {tensor.dtype}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"tensor {name!r} holds NaN or infinite values and is not saved")
        data = tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else b""
        digests += digest(name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), data)
    return {
        "qbert_format_version": str(FORMAT_VERSION),
        "qbert_packing": packing,
        "qbert_architecture": architecture,
        "qbert_config": json.dumps(compute_fields, sort_keys=True),
        "qbert_sha256": base64.b85encode(digests).decode(),
    }


def canonicalize_header(path: str) -> None:
    """Rewrite a safetensors file in one order, so that equal contents are equal bytes: metadata by key, tensors by
    width of their type, then size, then name. Small tensors first have short offsets, which saves a kilobyte."""
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        ordered, source, position = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))}, [], 0

        def place(item: tuple[str, dict]) -> tuple[int, int, str]:
            name, (begin, end) = item[0], item[1]["data_offsets"]
            return -_ITEM_SIZE[item[1]["dtype"]], end - begin, name

        for name, entry in sorted(header.items(), key=place):
            begin, end = entry["data_offsets"]
            ordered[name] = entry | {"data_offsets": [position, position + end - begin]}
            source.append((start + begin, end - begin))
            position += end - begin
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with open(path + ".tmp", "wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for begin, size in source:
                file.seek(begin)
                target.write(file.read(size))
            target.flush()
            os.fsync(target.fileno())
    os.replace(path + ".tmp", path)


def open_packed(path: str) -> PackedFile:
    """Map a packed file and check its structure: lengths, header, dtypes, shapes, offsets, version."""
    if not path.endswith(".safetensors"):
        raise CheckpointError(f"{path}: a packed checkpoint is one {WEIGHTS_FILE}; other formats are not opened")
    try:
        size = os.path.getsize(path)
        if size < 8:
            raise CheckpointError(f"{path}: file has {size} bytes, a safetensors file has at least 8")
        with open(path, "rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return _parse(path, view, size)


def stale_weights(folder: str) -> list[str]:
    """Names of weight files beside the one of a packed checkpoint: which one is loaded would be a guess."""
    pattern = re.compile(r"(model|pytorch_model)\b.*\.(safetensors|bin|index\.json)")
    return sorted(name for name in os.listdir(folder) if pattern.fullmatch(name) and name != WEIGHTS_FILE)


def check_folder(folder: str) -> PackedFile | None:
    """Check what lies in a local checkpoint folder before Transformers opens it.

    Returns the open file of a packed checkpoint, None of any other. A packed file without its `quantization_config`,
    and the other way round, is an error: its codes would be taken for weights.
    """
    config, path = os.path.join(folder, "config.json"), os.path.join(folder, WEIGHTS_FILE)
    try:
        with open(config, encoding="utf-8") as file:
            quantization = json.load(file).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{config}: is no readable JSON object ({error})") from None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "qbert":
        if _is_packed_file(path):
            raise CheckpointError(
                f"{config}: field 'quantization_config' must have quant_method 'qbert' for the packed weights of "
                f"{path}, found {quantization!r}"
            )
        return None
    stale = stale_weights(folder)
    if stale or not os.path.isfile(path):
        raise CheckpointError(f"{folder}: a packed checkpoint is one file {WEIGHTS_FILE}, found {stale or 'none'}")
    return open_packed(path)


def _is_packed_file(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES))
    except OSError:
        return False
    return b'"qbert_format_version"' in header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return result


def _parse(path: str, view: memoryview, size: int) -> PackedFile:
    length = int.from_bytes(view[:8], "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{path}: header claims {length} bytes; the file has {size} and a header at most {MAX_HEADER_BYTES}"
        )
    try:
        header = json.loads(bytes(view[8 : 8 + length]).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header must be a JSON object, found {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header field `__metadata__` must map strings to strings")
    tensors = {name: _record(path, name, entry) for name, entry in header.items()}
    position = 0
    for name, record in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if record.begin != position:
            raise CheckpointError(f"{path}: tensor {name!r} starts at byte {record.begin}, expected {position}")
        position = record.end
    if position != size - 8 - length:
        raise CheckpointError(f"{path}: file holds {size - 8 - length} bytes of tensors, its header {position}")
    packed = PackedFile(path, metadata, tensors, view[8 + length :])
    _check_metadata(packed)
    return packed


def _record(path: str, name: str, entry: Any) -> TensorRecord:
    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)

    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if len(entry) != 3 or dtype not in _ITEM_SIZE or not whole(shape) or not whole(offsets) or len(offsets) != 2:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path}: tensor {name!r} must have a dtype of {sorted(_ITEM_SIZE)}, a shape and two offsets, "
            f"found {entry!r}"
        ) from None
    record = TensorRecord(dtype, tuple(shape), *offsets)
    if record.end - record.begin != prod(shape) * _ITEM_SIZE[dtype]:
        raise CheckpointError(
            f"{path}: tensor {name!r} of {dtype} {shape} needs {prod(shape) * _ITEM_SIZE[dtype]} bytes, "
            f"its offsets hold {record.end - record.begin}"
        )
    return record


def _check_metadata(file: PackedFile) -> None:
    needed = ("qbert_format_version", "qbert_packing", "qbert_architecture", "qbert_config", "qbert_sha256")
    missing = [key for key in needed if key not in file.metadata]
    if missing:
        raise file.fail(f"header metadata lacks {missing}; this is not a packed checkpoint of this package")
    version = file.metadata["qbert_format_version"]
    if version != str(FORMAT_VERSION):
        raise file.fail(f"format version {version!r} is not {FORMAT_VERSION}, the one read here; update qbert-zoo")
    if file.metadata["qbert_packing"] not in PACKINGS:
        raise file.fail(f"packing {file.metadata['qbert_packing']!r} is not one of {PACKINGS}")


def check_digests(file: PackedFile) -> None:
    """Every tensor has a digest, and its bytes match."""
    try:
        digests = base64.b85decode(file.metadata["qbert_sha256"])
    except ValueError as error:
        raise file.fail(f"metadata field 'qbert_sha256' is not base85 ({error})") from None
    size = hashlib.sha256().digest_size
    if len(digests) != size * len(file.tensors):
        raise file.fail(
            f"metadata field 'qbert_sha256' must hold {size} bytes for each of {len(file.tensors)} tensors, "
            f"found {len(digests)}"
        )
    for index, (name, record) in enumerate(sorted(file.tensors.items())):
        found = digest(name, record.dtype, record.shape, file.data[record.begin : record.end])
        if found != digests[index * size : (index + 1) * size]:
            raise file.fail(f"tensor {name!r} does not match its SHA-256 digest; download the file again")
        file.forget(name)


def check_tensors(file: PackedFile, expected: Mapping[str, Expected]) -> None:
    """dtype, shape, codes and scales of every tensor in `expected`, all of which the file has; and all are finite."""
    for name, want in expected.items():
        record = file.tensors[name]
        dtypes = ("F32", "BF16", "F16") if want.dtype is None else (_DTYPE_NAMES[want.dtype],)
        if record.dtype not in dtypes:
            raise file.fail(f"tensor {name!r} must be {' or '.join(dtypes)}, found {record.dtype}")
        if record.shape != want.shape:
            raise file.fail(f"tensor {name!r} must have shape {list(want.shape)}, found {list(record.shape)}")
    if len(file.float_dtypes) > 1:
        found = sorted(map(str, file.float_dtypes))
        raise file.fail(f"tensors that are not packed must have one dtype, found {found}")
    for name, record in file.tensors.items():
        tensor, want = file.tensor(name), expected.get(name)
        if want is not None and want.packing and (invalid := find_invalid_code(tensor, want.columns, want.packing)):
            row, column, count = invalid
            raise file.fail(
                f"tensor {name!r} holds {count} values outside the {want.packing} alphabet, first at row {row}, "
                f"column {column}"
            )
        if record.dtype != "U8" and not bool(torch.isfinite(tensor).all()):
            raise file.fail(f"tensor {name!r} holds NaN or infinite values")
        if want is not None and want.is_scale and not bool(((tensor >= MIN_SCALE) & (tensor < MAX_SCALE)).all()):
            raise file.fail(
                f"tensor {name!r} must hold scales in [{MIN_SCALE:g}, {MAX_SCALE:g}), "
                f"found {float(tensor.min()):g} to {float(tensor.max()):g}"
            )
        if name.endswith("_quantizer.clip") and not bool(tensor[0] < tensor[1]):
            raise file.fail(f"tensor {name!r} must hold a lower and a higher clip, found {tensor.tolist()}")
        file.forget(name)


def check_config(
    file: PackedFile,
    compute_fields: dict[str, Any],
    defaults: Mapping[str, Any],
    ignore: frozenset[str] = frozenset(),
) -> None:
    """The config that a model is built from says what the file was saved with.

    A field that either of them lacks has its value in `defaults`: a file may be older than a field.
    """
    saved = file.json("qbert_config")
    found = json.loads(json.dumps(compute_fields))
    for name in sorted(set(saved) | set(found)):
        values = [fields.get(name, defaults.get(name)) for fields in (saved, found)]
        if name not in ignore and values[0] != values[1]:
            raise file.fail(f"was saved with config field {name!r} = {values[0]!r}, config.json says {values[1]!r}")
