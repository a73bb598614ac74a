"""Small random models of every family, backbone and head, and the few things that tests do with them."""

import base64
import hashlib
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from modeling_qbert import get_model_class
from modeling_qbert.layers import PackedEmbedding, PackedLinear, QuantEmbedding, QuantLinear
from modeling_qbert.modeling_ternary import HEADS
from modeling_qbert.quantizers import LsqQuantizer, PactQuantizer


# Odd on purpose: 36 columns are no whole number of 5-code bytes, 50 none of 4-code bytes; 7 leaves a short group.
ODD = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "vocab_size": 97,
    "max_position_embeddings": 40,
    "group_size": 7,
}
BACKBONE_SIZES = {"electra": {"embedding_size": 28}}  # ELECTRA projects its embeddings
EVERY_HEAD = [(backbone, head) for backbone, heads in HEADS.items() for head in heads]
LAYERS = QuantLinear | QuantEmbedding | PackedLinear | PackedEmbedding


def config(backbone: str, family: str = "ternary", **fields):
    return get_model_class(family, backbone, "base").config_class(
        **{**ODD, **BACKBONE_SIZES.get(backbone, {}), **fields}
    )


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every tensor shows in the answer (the usual 0.02 hides most mistakes)."""
    generator = torch.Generator().manual_seed(seed)
    learned = [module for module in model.modules() if isinstance(module, LsqQuantizer | PactQuantizer)]
    state = {id(parameter) for module in learned for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in state:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / (1 if "embeddings." in name else math.sqrt(parameter.shape[-1])))
        else:
            parameter.copy_(noise * 0.3 + ("LayerNorm.weight" in name))
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantEmbedding) and module.weight_scale is not None:
            module.weight_scale.zero_()
    if hasattr(model, "update_scales"):
        model.update_scales(None)
    return model.eval()


def latent(
    backbone: str = "bert", head: str = "sequence-classification", seed: int = 0, family: str = "ternary", **fields
) -> nn.Module:
    model = randomize(get_model_class(family, backbone, head)(config(backbone, family, **fields)), seed)
    model.calibrate(**inputs(head))
    return model


def inputs(head: str = "base", batch: int = 3, tokens: int = 11, seed: int = 1) -> dict[str, Tensor]:
    """ids and mask (B, T) with padding in all but the first row; (B, 2, T) for multiple choice."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2, tokens) if head == "multiple-choice" else (batch, tokens)
    ids = torch.randint(3, ODD["vocab_size"], shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.long)
    for row in range(1, batch):
        mask[row, ..., tokens - 2 * row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def answers(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Every float that a model returns for real tokens, in one vector."""
    outputs = model(**given, return_dict=True).to_tuple()
    real = given["attention_mask"].bool()
    parts = [x[real] if x.shape[: real.dim()] == real.shape else x for x in outputs]
    result = torch.cat([part.flatten() for part in parts])
    assert result.numel() and bool(torch.isfinite(result).all())
    return result


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


def assert_same_codes(model: nn.Module, other: nn.Module) -> None:
    left, right = quantized_layers(model), quantized_layers(other)
    assert left.keys() == right.keys() and left
    for name, layer in left.items():
        one, two = layer.quantize_weight(), right[name].quantize_weight()
        assert one.codes.dtype == two.codes.dtype == torch.int8
        assert torch.equal(one.codes, two.codes), name
        assert one.scale.dtype == two.scale.dtype == torch.float32
        assert torch.equal(one.scale, two.scale), name


def read_parts(path: Path) -> tuple[dict, bytes]:
    """(header, data) of a safetensors file."""
    raw = Path(path).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_parts(path: Path, header: dict | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def sign(header: dict, data: bytes) -> dict:
    """Recompute the digests of a changed file, so that only the checks of values are left to find the change."""
    digests = b""
    for name, entry in sorted(header.items()):
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            sha = hashlib.sha256(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            sha.update(data[begin:end])
            digests += sha.digest()
    header["__metadata__"]["qbert_sha256"] = base64.b85encode(digests).decode()
    return header
