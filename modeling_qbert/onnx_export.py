"""Packed models as ONNX graphs whose weights stay packed.

A linear layer becomes `com.microsoft.MatMulNBits`, ONNX Runtime's product with weights of 2, 4 or 8 bits. Its input is
not the activation but the activation's codes, quantized in the graph as the packed model quantizes them: products of
whole numbers, added exactly in float32. Scales and offsets follow by the formula of `ops.linear_codes`, so ONNX
Runtime computes the packed model's answer, not one near it. With `accuracy_level=4` MatMulNBits would quantize its
input once more, to 8 bits a block; it is not used. With full-precision activations the product is one of floats.

    weight bits    1 (stored) -> 2      2      3, 4 -> 4      8           bits of MatMulNBits
    stored code    (c + 1) / 2          c + 2  c + 8          c + 128     c + its default zero point, low bits first

Binary weights are stored at one bit and widened by a look-up that ONNX Runtime computes once, when it loads the file.
Embeddings stay in the layout of the checkpoint: a look-up of rows, then one of the codes of each byte.

Shapes: B batch, T tokens, O out rows, I in columns, K blocks of a row.
"""

import copy
import json
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .layers import PackedEmbedding, PackedLinear, WeightSpec, quantize_signed
from .lora import refuse_adapters
from .ops import add_products, flatten_planes, scaled_code_sums
from .packing import CODE_TABLES
from .quantizers import ActivationQuantizer, PactQuantizer, Quantized


OPSET = 20  # what torch.onnx.export of torch 2.10 to 2.13 writes unasked
BLOCK_SIZES = (16, 32, 64, 128)  # of MatMulNBits; at 2 bits it has 256 too, measured slower than 128
KERNEL_BITS = {1: 2, 2: 2, 3: 4, 4: 4, 8: 8}  # bits of a weight -> of MatMulNBits
TOLERANCE = 1e-4  # largest difference of an answer; measured: 7e-7 on a trained MiniLM
PRODUCER = "qbert-zoo"


def block_size(columns: int) -> int:
    """The largest block among those that pad a row of `columns` least."""
    return min(BLOCK_SIZES, key=lambda size: (-(-columns // size) * size, -size))


def _digits(codes: Tensor, bits: int) -> Tensor:
    return (codes + 1) // 2 if bits == 1 else codes + 2 ** (bits - 1)


def _join(digits: Tensor, bits: int) -> Tensor:
    """Digits (..., I) of `bits` bits, I a whole number of bytes -> uint8 (..., I * bits / 8), low bits first."""
    places = 2 ** (bits * torch.arange(8 // bits))
    return (digits.unflatten(-1, (-1, 8 // bits)) * places).sum(-1).to(torch.uint8)


def _widening(stored: int, bits: int) -> Tensor:
    """uint8 (256, bits / stored): the bytes of `bits` bits a code that a byte of `stored` bits a code becomes."""
    digits = torch.arange(256).unsqueeze(1) // 2 ** (stored * torch.arange(8 // stored)) % 2**stored
    return _join(_digits(digits * 2 - 1 if stored == 1 else digits - 2 ** (stored - 1), bits), bits)


class _Plane(nn.Module):
    """One matrix of codes (O, I) and its scale for MatMulNBits."""

    def __init__(self, weight: Quantized, spec: WeightSpec, exact: bool, name: str):
        super().__init__()
        self.bits, (self.rows, self.columns) = KERNEL_BITS[spec.bits], weight.codes.shape
        grouped = weight.scale.shape[1] > 1
        self.block = spec.group_size if grouped else block_size(self.columns)
        if self.block not in BLOCK_SIZES:
            raise ValueError(f"{name}: config field `group_size` is {self.block}, ONNX Runtime has {BLOCK_SIZES}")
        stored = 1 if spec.bits == 1 else self.bits
        digits = _digits(F.pad(weight.codes.int(), (0, -self.columns % self.block)), stored)
        self.register_buffer("weight", _join(digits.unflatten(1, (-1, self.block)), stored))  # (O, K, bytes)
        self.register_buffer("widening", None if stored == self.bits else _widening(stored, self.bits))
        # Whole numbers are added exactly if the scale follows the product, which it can if a row has one.
        shape, after = (self.rows, self.weight.shape[1]), exact and not grouped
        self.register_buffer("block_scales", torch.ones(shape) if after else weight.scale.expand(shape).clone())
        self.register_buffer("scale", weight.scale.view(1, -1).clone() if after else torch.ones(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O), times the blocks' scales."""
        weight = self.weight
        if self.widening is not None:
            weight = F.embedding(weight.long(), self.widening).flatten(-2)
        attributes = {"K": self.columns, "N": self.rows, "bits": self.bits, "block_size": self.block}
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, weight, self.block_scales),
            attrs={**attributes, "accuracy_level": 0},
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.rows),
            version=1,
        )


class OnnxLinear(nn.Module):
    """`PackedLinear` in ONNX operators; made to be traced, in torch its products are empty."""

    def __init__(self, layer: PackedLinear, name: str):
        super().__init__()
        self.activation, weight = layer.activation, layer.quantize_weight()
        planes = [weight] if weight.codes.dim() == 2 else [Quantized(*plane) for plane in zip(*weight[:2])]
        self.planes = nn.ModuleList(_Plane(plane, layer.spec, self.activation is not None, name) for plane in planes)
        sums = scaled_code_sums(flatten_planes(weight), layer.spec.bound, layer.spec.group_size, layer.spec.planes)
        self.register_buffer("sums", sums.sum(0, keepdim=True))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is None:
            y = self.bias
            for plane in self.planes:
                y = plane(x) if y is None else y + plane(x)
            return y
        _, activation = quantize_signed(x, self.activation)
        products = [plane(activation.codes) for plane in self.planes]
        return add_products(self.bias, products, activation, [plane.scale for plane in self.planes], self.sums)


class OnnxEmbedding(nn.Module):
    """`PackedEmbedding` in operators that ONNX has for bytes."""

    def __init__(self, layer: PackedEmbedding):
        super().__init__()
        self.spec, self.num_embeddings, self.columns = layer.spec, layer.num_embeddings, layer.columns
        self.padding_idx, weight = layer.padding_idx, layer.weight
        if layer.packing == "int8":
            weight = weight[..., : self.columns].contiguous().view(torch.int8)
        planes = layer.spec.planes
        self.register_buffer("weight", weight.reshape(planes, self.num_embeddings, -1))
        self.register_buffer("scale", layer.weight_scale.float().reshape(planes, -1, layer.weight_scale.shape[-1]))
        self.register_buffer("table", None if layer.packing == "int8" else CODE_TABLES[layer.packing].float())

    def _look_up(self, input_ids: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        codes = F.embedding(input_ids, weight)
        if self.table is not None:
            codes = F.embedding(codes.long(), self.table).flatten(-2)[..., : self.columns]
        if scale.shape[0] > 1:
            scale = F.embedding(input_ids, scale)
        if scale.shape[-1] > 1:
            scale = scale.repeat_interleave(self.spec.group_size, -1)[..., : self.columns]
        return codes.float() * scale

    def forward(self, input_ids: Tensor) -> Tensor:
        return sum(self._look_up(input_ids, *plane) for plane in zip(self.weight, self.scale))


def _quantize_clipped(
    dynamic: ActivationQuantizer, low: float, high: float, x: Tensor, valid: Tensor | None = None, dims=(-1,)
) -> tuple[Tensor, Quantized]:
    """`PactQuantizer.quantize` with constant clips: of learned ones onnxscript 0.7 writes an invalid graph."""
    return dynamic.quantize(x.float().clamp(low, high), valid, dims)


@torch.no_grad()
def onnx_operators(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a low-bit model to give to an exporter: `torch.onnx.export` or `transformers.exporters.OnnxExporter`.

    Its quantized layers are ONNX operators on packed weights; traced they are the model, run in torch they are not.

    Raises:
        ValueError: adapters, another float type than float32, activation ranges over the batch, or a group size that
            ONNX Runtime lacks.
    """
    refuse_adapters(model, "export")
    if model.dtype != torch.float32:
        raise ValueError(f"export needs a model in float32, found {model.dtype}: load it with dtype=torch.float32")
    if model.config.bit_widths[2] != 32 and model.config.activation_granularity == "per_tensor":
        raise ValueError(
            "config field `activation_granularity` is 'per_tensor': an answer would depend on its batch and padding; "
            "ONNX export has 'per_token'"
        )
    model = (copy.deepcopy(model) if model.is_packed else model.pack()).eval()
    shared: dict[tuple[int, ...], Tensor] = {}  # one table of ones for all layers of a shape
    for name, module in list(model.named_modules()):
        if isinstance(module, PactQuantizer):
            module.quantize = partial(_quantize_clipped, module.dynamic, *module.clip.tolist())
        if isinstance(module, PackedLinear):
            layer = OnnxLinear(module, name)
            for plane in layer.planes:
                if bool((plane.block_scales == 1).all()):
                    plane.block_scales = shared.setdefault(tuple(plane.block_scales.shape), plane.block_scales)
            model.set_submodule(name, layer)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedEmbedding):
            model.set_submodule(name, OnnxEmbedding(module))
    return model


def example_inputs(model: PreTrainedModel, batch: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Random ids (B, T), for multiple choice (B, 2, T), and a mask that hides the second half of every other row."""
    shape = (batch, 2, tokens) if type(model).__name__.endswith("MultipleChoice") else (batch, tokens)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, model.config.vocab_size, shape, generator=generator)  # RoBERTa pads with 1
    mask = torch.ones_like(ids)
    mask[1::2, ..., (tokens + 1) // 2 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | ({"token_type_ids": torch.zeros_like(ids)} if model.config.type_vocab_size > 1 else {})


def _positions(model: PreTrainedModel) -> int:
    table = model.base_model.embeddings.position_embeddings
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


@torch.no_grad()
def export_onnx(model: PreTrainedModel, file: str | os.PathLike) -> dict[str, Any]:
    """Write a low-bit model as one ONNX file that ONNX Runtime loads without this package.

    Inputs are `input_ids`, `attention_mask` and, where the model has them, `token_type_ids`: int64 (B, T) of any batch
    and length. Outputs have the names of the model's own. Before the file gets its name, ONNX Runtime answers random
    inputs of several shapes with it.

    Returns:
        `bytes` of the file and `difference`, the largest between an answer and the model's.

    Raises:
        RuntimeError: onnx, onnxscript or onnxruntime is missing, or answers differ by more than `TOLERANCE`.
        ValueError: as `onnx_operators`.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx.export needs it)
    except ImportError as error:
        raise RuntimeError(f"export needs the extra `onnx` (pip install 'qbert-zoo[onnx]'): {error}") from error
    file = Path(file)
    packed = (model if model.is_packed else model.pack()).eval()
    inputs = example_inputs(packed, 2, min(9, _positions(packed)))
    outputs = list(packed(**inputs, return_dict=True))
    names = ("batch", "tokens") if inputs["input_ids"].dim() == 2 else ("batch", "choices", "tokens")
    sizes = {index: torch.export.Dim(name, min=1) for index, name in enumerate(names)}
    with warnings.catch_warnings():  # of axes that share a name, as they should
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            onnx_operators(packed),
            (),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=dict.fromkeys(inputs, sizes),
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            external_data=False,
            verbose=False,
        )
    proto = program.model_proto
    for node in proto.graph.node:  # traces of the export: half a file
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for part in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        part.ClearField("metadata_props")
    proto.graph.ClearField("value_info")
    proto.ClearField("metadata_props")
    proto.producer_name = PRODUCER
    fields = json.loads(packed.config.to_json_string(use_diff=False))  # labels also where they are the default ones
    fields.pop("_name_or_path", None)
    onnx.helper.set_model_props(proto, {"architecture": type(model).__name__, "config": json.dumps(fields, indent=2)})
    content = proto.SerializeToString(deterministic=True)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = float(np.max([_difference(packed, session, shape) for shape in ((1, 1), (2, 9), (3, 33))]))
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{file}: ONNX Runtime's answers differ by {difference:.2g}, at most {TOLERANCE} is allowed"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        staging.write_bytes(content)
        os.replace(staging, file)
    finally:
        staging.unlink(missing_ok=True)
    return {"bytes": len(content), "difference": difference}


def _difference(model: PreTrainedModel, session: Any, shape: tuple[int, int]) -> float:
    """Largest difference over all outputs of `example_inputs` (B, T), T at most what the model has positions for; not
    at padding, which the native engine leaves out."""
    inputs = example_inputs(model, shape[0], min(shape[1], _positions(model)), seed=1)
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    expected = model(**inputs, return_dict=True).to_tuple()
    return max(
        np.abs(without_padding(one - two.numpy(), inputs["attention_mask"].numpy())).max().item()
        for one, two in zip(found, expected, strict=True)
    )


def without_padding(output: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
    """Rows of an output (B, T, ...) at real tokens, (N, ...); any other output as it is."""
    return output[attention_mask.astype(bool)] if output.shape[:2] == attention_mask.shape else output
