"""What a packed checkpoint folder holds: sizes per part, and whether it may be used. Neither loads the model."""

import os
from math import prod
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from .checkpoint import QUANTIZER_STATE, WEIGHTS_FILE, CheckpointError, PackedFile, check_folder
from .integration import MODEL_CLASSES, QbertConfig, check_file, expected_tensors, swap_to_packed


_BITS = {"1bit": 1, "2bit": 2, "dense": 2, "3bit": 3, "4bit": 4, "int8": 8}  # as the papers count them


def verify_checkpoint(folder: str | os.PathLike) -> None:
    """Check structure, digests, codes, scales and config of a packed checkpoint, reading one tensor at a time.

    Raises:
        CheckpointError: what is wrong, with the file and the tensor or field.
    """
    _open(os.fspath(folder), check=True)


def checkpoint_report(folder: str | os.PathLike) -> dict[str, Any]:
    """Sizes of a packed checkpoint; contents are not checked (see `verify_checkpoint`).

    Returns `architecture`, `bits`, `packing`; `parts` (name -> bytes, whose sum is the file), `bytes`, `MB` (10^6) and
    `MiB` (2^20) of the file; `parameters` and `fp32_bytes` of the same model in full precision and their `ratio` to
    the file, planes counted once; and `papers`, the way their tables count: word embedding, encoder and pooler at
    their bits, everything else at 32 and no row scales, in MiB, against all parameters at 32 bits. TernaryBERT counts
    so; BinaryBERT leaves out position and token type embeddings as well, and so does this count of binary weights.
    """
    model, file = _open(os.fspath(folder), check=False)
    expected, prefix = expected_tensors(model), model.base_model_prefix + "."
    size = os.path.getsize(file.path)
    parts = dict.fromkeys(
        (
            "word embedding",
            "other embeddings",
            "encoder",
            "pooler",
            "scales",
            "LayerNorm and biases",
            "head",
            "header",
        ),
        0,
    )
    parts["header"] = size - sum(record.end - record.begin for record in file.tensors.values())
    parameters = bits = 0
    binary = 1 in model.config.bit_widths[:2]
    for name, record in file.tensors.items():
        want = expected.get(name)
        packed = want is not None and want.packing is not None
        part = _part(name.removeprefix(prefix), packed, name.startswith(prefix) or model.base_model is model)
        parts[part] += record.end - record.begin
        if part == "scales":
            continue
        stored = prod(record.shape[:-1]) * want.columns if packed else prod(record.shape)
        parameters += stored // (record.shape[0] if packed and len(record.shape) == 3 else 1)
        if not (binary and part == "other embeddings"):
            bits += stored * (_BITS[want.packing] if packed else 32)
    return {
        "architecture": type(model).__name__,
        "bits": model.config.bits,
        "packing": file.metadata["qbert_packing"],
        "parts": parts,
        "bytes": size,
        "MB": size / 1e6,
        "MiB": size / 2**20,
        "parameters": parameters,
        "fp32_bytes": 4 * parameters,
        "ratio": 4 * parameters / size,
        "papers": {"MiB": bits / 8 / 2**20, "fp32_MiB": 4 * parameters / 2**20, "ratio": 32 * parameters / bits},
    }


def format_report(folder: str | os.PathLike) -> str:
    """`checkpoint_report` as a table for people."""
    report = checkpoint_report(folder)
    papers = report["papers"]
    lines = [f"{report['architecture']}, bits {report['bits']} (W-E-A), packing {report['packing']}", ""]
    rows = [*report["parts"].items(), ("file", report["bytes"]), ("same model in fp32", report["fp32_bytes"])]
    lines += [f"{'part':<20} {'bytes':>13} {'MB':>9} {'MiB':>9}"]
    lines += [f"{name:<20} {size:>13,} {size / 1e6:>9.3f} {size / 2**20:>9.3f}" for name, size in rows]
    lines += [
        "",
        f"{report['parameters']:,} parameters, {report['ratio']:.1f} times smaller than fp32 (everything included)",
        f"as the papers count (see checkpoint_report): {papers['MiB']:.2f} of {papers['fp32_MiB']:.2f} MiB, "
        f"{papers['ratio']:.1f} times smaller",
    ]
    return "\n".join(lines)


def _part(name: str, packed: bool, in_backbone: bool) -> str:
    """Part of a tensor; `name` without the backbone's prefix. A packed layer after the encoder is a pooler."""
    if name.endswith(QUANTIZER_STATE):
        return "scales"
    if in_backbone and name == "embeddings.word_embeddings.weight":
        return "word embedding"
    if name.startswith("embeddings.") and packed:
        return "other embeddings"
    if packed or name == "pooler.dense.weight":
        return "encoder" if name.startswith("encoder.") else "pooler"
    if not in_backbone:
        return "head"
    if name.endswith(".bias") or ".LayerNorm." in name:
        return "LayerNorm and biases"
    return "encoder" if name.startswith("encoder.") else "other embeddings"


def _open(folder: str, check: bool) -> tuple[PreTrainedModel, PackedFile]:
    """Packed model on the meta device and the open file of a folder."""
    path = os.path.join(folder, "config.json")
    file = check_folder(folder)
    if file is None:
        raise CheckpointError(f"{path}: lacks the field 'quantization_config'; this is not a packed checkpoint")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: {error}") from error
    name = (config.architectures or [None])[0]
    model_class = MODEL_CLASSES.get(name)
    if model_class is None or not isinstance(config, model_class.config_class):
        raise CheckpointError(f"{path}: field 'architectures' is {name!r}, no model of type {config.model_type!r}")
    try:
        quantization = QbertConfig.from_dict(dict(config.quantization_config))
        with torch.device("meta"):
            model = model_class(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    swap_to_packed(model, quantization.packing)
    if check:
        check_file(os.path.join(folder, WEIGHTS_FILE), model, quantization.packing)
        if config.dtype is not None and config.dtype not in file.float_dtypes:
            held = sorted(map(str, file.float_dtypes))
            raise CheckpointError(f"{path}: field 'dtype' is {config.dtype}, the file holds {held}")
    return model, file
