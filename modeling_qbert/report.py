"""What a packed checkpoint folder holds: sizes per part, and whether it may be used. Neither loads the model."""

import os
from math import prod
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from .checkpoint import QUANTIZER_STATE, WEIGHTS_FILE, CheckpointError, PackedFile, check_folder
from .configuration_qbert import LowBitConfig
from .integration import MODEL_CLASSES, QbertConfig, check_file, expected_tensors, swap_to_packed


GHOST_STATE = ("ghost_kernel", "ghost_scale")  # of `ghost.GhostFeatures`
_BITS = {"1bit": 1, "2bit": 2, "dense": 2, "3bit": 3, "4bit": 4, "int8": 8}  # as the papers count them


def verify_checkpoint(folder: str | os.PathLike) -> None:
    """Check structure, digests, codes, scales and config of a packed checkpoint, reading one tensor at a time.

    Raises:
        CheckpointError: what is wrong, with the file and the tensor or field.
    """
    _open(os.fspath(folder), check=True)


def multiply_adds(config: LowBitConfig, tokens: int = 128) -> dict[str, int]:
    """Multiply-adds of one sentence in the encoder that a config describes, of its `backbone` and of its `ghosts`.

    Counted are products with matrices and kernels and the two of attention, whatever their bits, planes once. As usual
    nothing element-wise is counted (LayerNorm, activation functions, scales, factors of ghost features), nor the
    pooler and head, which see one token.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = heads * (config.head_dim or hidden // heads)
    layer = 4 * hidden * width + 2 * hidden * config.intermediate_size + 2 * tokens * width
    embeddings = getattr(config, "embedding_size", hidden)
    projection = embeddings * hidden if embeddings != hidden else 0
    backbone = tokens * (config.num_hidden_layers * layer + projection)
    return {"backbone": backbone, "ghosts": tokens * config.num_hidden_layers * _ghost_weights(config)}


def ghost_parameters(config: LowBitConfig) -> int:
    """Kernel weights and factors of all ghost features that a config describes."""
    return config.num_hidden_layers * (_ghost_weights(config) + _ghosts(config) * config.hidden_size)


def _ghosts(config: LowBitConfig) -> int:
    """Ghost features of a layer."""
    return getattr(config, "attention_ghosts", 0) + getattr(config, "feed_forward_ghosts", 0)


def _ghost_weights(config: LowBitConfig) -> int:
    """Kernel weights of a layer; each has one multiply-add a token."""
    return _ghosts(config) and _ghosts(config) * config.hidden_size * config.ghost_kernel_size


def checkpoint_report(folder: str | os.PathLike) -> dict[str, Any]:
    """Sizes of a packed checkpoint; contents are not checked (see `verify_checkpoint`).

    Returns `architecture`, `bits`, `packing`; `parts` (name -> bytes, whose sum is the file), `bytes`, `MB` (10^6) and
    `MiB` (2^20) of the file; `parameters` and `fp32_bytes` of the same model in full precision and their `ratio` to
    the file, planes counted once; and `papers`, the way their tables count: word embedding, encoder and pooler at
    their bits, everything else at 32 and no row scales, in MiB, against all parameters at 32 bits. TernaryBERT counts
    so; BinaryBERT leaves out position and token type embeddings as well, and so does this count of binary weights. Of
    BERT-base it makes 27.95 for ternary weights (TernaryBERT's table: 28.0) and 13.46 for binary ones in one plane
    (BinaryBERT's: 13.4).
    `multiply_adds` are those of one sentence (see the function of that name) and `ghost_parameters` are among
    `parameters`.
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
    if _ghosts(model.config):
        parts["ghost features"] = 0
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
        "ghost_parameters": ghost_parameters(model.config),
        "multiply_adds": multiply_adds(model.config),
        "fp32_bytes": 4 * parameters,
        "ratio": 4 * parameters / size,
        "papers": {"MiB": bits / 8 / 2**20, "fp32_MiB": 4 * parameters / 2**20, "ratio": 32 * parameters / bits},
    }


def format_report(folder: str | os.PathLike) -> str:
    """`checkpoint_report` as a table for people; of an unpacked checkpoint with ghost features, what these cost."""
    folder = os.fspath(folder)
    if check_folder(folder) is None and _ghosts(AutoConfig.from_pretrained(folder)):
        config, model = _empty_model(folder)
        whole = {"bits": "32-32-32", "planes": 1, "split_modules": None, "ternary_modules": None}
        with torch.device("meta"):
            plain = type(model)(type(config).from_dict(config.to_dict() | whole))
        costs = _format_costs(config, sum(parameter.numel() for parameter in plain.parameters()))
        return f"{type(model).__name__}, bits {config.bits} (W-E-A), not packed\n{costs}"
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
    if report["ghost_parameters"]:
        lines.append(_format_costs(AutoConfig.from_pretrained(folder), report["parameters"]))
    return "\n".join(lines)


def _format_costs(config: LowBitConfig, parameters: int) -> str:
    """Ghost features against the backbone."""
    ghosts, products = ghost_parameters(config), multiply_adds(config)
    return (
        f"ghost features: {ghosts:,} parameters on {parameters - ghosts:,} of the backbone "
        f"({ghosts / (parameters - ghosts):.2%}), {products['ghosts']:,} multiply-adds on {products['backbone']:,} "
        f"({products['ghosts'] / products['backbone']:.2%}) for 128 tokens"
    )


def _part(name: str, packed: bool, in_backbone: bool) -> str:
    """Part of a tensor; `name` without the backbone's prefix. A packed layer after the encoder is a pooler."""
    if name.endswith(QUANTIZER_STATE):
        return "scales"
    if name.endswith(GHOST_STATE):
        return "ghost features"
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
    config, model = _empty_model(folder)
    try:
        quantization = QbertConfig.from_dict(dict(config.quantization_config))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if model.base_model is model and not any(name.startswith("pooler.") for name in file.tensors):
        model.pooler = None  # a backbone may lack it, which no config says
    swap_to_packed(model, quantization.packing)
    if check:
        check_file(os.path.join(folder, WEIGHTS_FILE), model, quantization.packing)
        if config.dtype is not None and config.dtype not in file.float_dtypes:
            held = sorted(map(str, file.float_dtypes))
            raise CheckpointError(f"{path}: field 'dtype' is {config.dtype}, the file holds {held}")
    return model, file


def _empty_model(folder: str) -> tuple[LowBitConfig, PreTrainedModel]:
    """Config of a folder and the latent model that it describes, on the meta device."""
    path = os.path.join(folder, "config.json")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: {error}") from error
    name = (config.architectures or [None])[0]
    model_class = MODEL_CLASSES.get(name)
    if model_class is None or not isinstance(config, model_class.config_class):
        raise CheckpointError(f"{path}: field 'architectures' is {name!r}, no model of type {config.model_type!r}")
    try:
        with torch.device("meta"):
            return config, model_class(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
