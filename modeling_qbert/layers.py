"""Layers: latent (fp32 weights, fake-quant forward) and packed (bits and scales), same answers.

Shapes: O out rows, I in columns, V vocabulary, C embedding width, G groups.
"""

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops import dequantize_weight, gelu, has_fast_int8, layer_norm, quantized_linear, scaled_code_sums
from .packing import pack_codes, packed_columns, unpack_codes
from .quantizers import (
    WEIGHT_QUANTIZERS,
    ActivationQuantizer,
    Quantized,
    StraightThrough,
    lat_scale,
    scale_shape,
)


@dataclass(frozen=True)
class WeightSpec:
    """How one weight becomes codes: a row of `WEIGHT_QUANTIZERS` and the granularity of its scale."""

    quantizer: str
    granularity: str
    group_size: int

    @property
    def bits(self) -> int:
        return WEIGHT_QUANTIZERS[self.quantizer][0]

    @property
    def bound(self) -> int:
        """Largest magnitude of a code."""
        return 1 if self.bits == 2 else 2 ** (self.bits - 1) - 1

    def packing(self, ternary_packing: str) -> str:
        """Layout of the packed bits, given the one chosen for ternary codes."""
        return ternary_packing if self.bits == 2 else "int8"

    def quantize(self, weight: Tensor, scale: Tensor | None) -> Quantized:
        """Codes int8 and scale of a latent weight (O, I); `scale` is the state of the loss-aware quantizer."""
        quantizer = WEIGHT_QUANTIZERS[self.quantizer][1]
        with torch.no_grad():
            if self.quantizer == "lat":
                return quantizer(weight, scale, self.group_size)
            return quantizer(weight, self.granularity, self.group_size)


class _LatentMixin:
    """What QuantLinear and QuantEmbedding share: their spec and, for `lat`, the scale as a saved buffer."""

    spec: WeightSpec
    weight: Tensor
    weight_scale: Tensor | None

    def _init_spec(self, spec: WeightSpec, device) -> None:
        self.spec = spec
        shape = scale_shape(*self.weight.shape, spec.granularity, spec.group_size)
        self.register_buffer("weight_scale", torch.zeros(shape, device=device) if spec.quantizer == "lat" else None)

    def quantize_weight(self) -> Quantized:
        """Codes int8 (O, I) and scale of the latent weight as the forward uses them."""
        return self.spec.quantize(self.weight.detach(), self.weight_scale)

    @torch.no_grad()
    def update_scale(self, second_moment: Tensor | None) -> None:
        """Refresh the loss-aware scale with curvature sqrt(v), v Adam's second moment (Hou & Kwok, section 3)."""
        cold = not bool((self.weight_scale > 0).all())
        curvature = None if second_moment is None else second_moment.to(self.weight.dtype).sqrt()
        scale = lat_scale(
            self.weight,
            curvature,
            self.spec.granularity,
            self.spec.group_size,
            **({} if cold else {"start": self.weight_scale, "iterations": 1}),
        )
        self.weight_scale.copy_(scale)


class QuantLinear(_LatentMixin, nn.Linear):
    """nn.Linear with a fake-quantized weight and, unless `activation` is None, fake-quantized input.

    `source` names, in a tuple so that it is no submodule, the embedding whose codes and scales a tied decoder uses.
    """

    def __init__(
        self,
        linear: nn.Linear,
        spec: WeightSpec,
        activation: ActivationQuantizer | None,
        source: tuple["QuantEmbedding", ...] = (),
    ):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.activation, self.token_mask, self.source = activation, None, source
        self._init_spec(spec, linear.weight.device)
        if source:
            self.weight_scale = None

    def quantize_weight(self) -> Quantized:
        return self.source[0].quantize_weight() if self.source else super().quantize_weight()

    def forward(self, x: Tensor) -> Tensor:
        return _linear(self, x, self.weight, self.quantize_weight())


def check_ids(input_ids: Tensor, rows: int) -> None:
    """Clear error for ids that an embedding of `rows` rows lacks; only on CPU, another device would have to wait."""
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32, found {input_ids.dtype}")
    if input_ids.device.type != "cpu" or not input_ids.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"input_ids must be in [0, {rows - 1}] (vocab_size {rows}), found {low if low < 0 else high}")


class QuantEmbedding(_LatentMixin, nn.Embedding):
    """nn.Embedding whose rows are fake-quantized; with one scale per row only the rows looked up are quantized."""

    def __init__(self, embedding: nn.Embedding, spec: WeightSpec):
        super().__init__(
            embedding.num_embeddings, embedding.embedding_dim, padding_idx=embedding.padding_idx, device="meta"
        )
        self.weight = embedding.weight
        self._init_spec(spec, embedding.weight.device)

    def forward(self, input_ids: Tensor) -> Tensor:
        check_ids(input_ids, self.num_embeddings)
        latent = super().forward(input_ids)
        if self.spec.granularity == "per_tensor":
            rows = F.embedding(input_ids, dequantize_weight(self.quantize_weight(), self.spec.group_size))
        else:
            scale = None if self.weight_scale is None else self.weight_scale[input_ids.flatten()]
            quantized = self.spec.quantize(latent.detach().flatten(0, -2), scale)
            rows = dequantize_weight(quantized, self.spec.group_size).view_as(latent)
        return StraightThrough.apply(latent, rows)


def _linear(
    layer: "QuantLinear | PackedLinear",
    x: Tensor,
    latent: Tensor | None,
    weight: Quantized,
    sums: Tensor | None = None,
) -> Tensor:
    spec = layer.spec
    if layer.activation is None:
        value = dequantize_weight(weight, spec.group_size)
        value = value if latent is None else StraightThrough.apply(latent, value)
        return F.linear(x, value.to(x.dtype), layer.bias)
    activation = _quantize_input(x, layer.activation, layer.token_mask)
    rows = x.reshape(-1, x.shape[-1])
    y = quantized_linear(rows, latent, layer.bias, activation, weight, spec.bound, spec.group_size, sums)
    return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)


_last_input = threading.local()  # query, key and value read one tensor: it is quantized once


@torch.no_grad()
def _quantize_input(x: Tensor, quantizer: ActivationQuantizer, token_mask: Tensor | None) -> Quantized:
    """int8 codes (N, I) of x (..., I), scale and offset (N, 1) or (1, 1)."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        key = (quantizer, x._version if not x.is_inference() else None, id(token_mask))
        previous, previous_key, quantized = getattr(_last_input, "value", (None, None, None))
        if previous is not None and previous() is x and previous_key == key and key[1] is not None:
            return quantized
    valid = token_mask.unsqueeze(-1) if token_mask is not None and token_mask.shape == x.shape[:-1] else None
    codes, scale, offset = quantizer(x, valid)
    quantized = Quantized(
        codes.to(torch.int8).view(-1, x.shape[-1]),
        scale.view(-1, 1),
        None if offset is None else offset.view(-1, 1),
    )
    if not compiling:
        _last_input.value = (weakref.ref(x), key, quantized)
    return quantized


class FixedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose answers in eval mode are those of `ops.layer_norm`; training uses torch's faster kernel, which
    rounds otherwise from one CPU to the next."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__(norm.normalized_shape, eps=norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else layer_norm(x, self.weight, self.bias, self.eps)


class FixedGELU(nn.Module):
    """GELU whose answers in eval mode are those of `ops.gelu`; training uses torch's faster kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) if self.training else gelu(x)


class _PackedMixin:
    """What PackedLinear and PackedEmbedding share: uint8 bits, fp32 scales that no cast of the model touches."""

    weight: Tensor
    weight_scale: Tensor
    spec: WeightSpec
    columns: int
    packing: str

    def _init_packed(self, rows: int, columns: int, spec: WeightSpec, packing: str, device) -> None:
        self.spec, self.columns, self.packing = spec, columns, spec.packing(packing)
        shape = (rows, packed_columns(columns, self.packing))
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.uint8, device=device))
        shape = scale_shape(rows, columns, spec.granularity, spec.group_size)
        self.register_buffer("weight_scale", torch.ones(shape, dtype=torch.float32, device=device))

    def load_quantized(self, quantized: Quantized) -> None:
        """Take codes (O, I) and scale as this layer's state."""
        self.weight = pack_codes(quantized.codes, self.packing)
        self.weight_scale = quantized.scale.detach().float().clone()

    def quantize_weight(self) -> Quantized:
        """Codes int8 (O, I) and scale, as `quantize_weight` of the latent layer gave them."""
        return Quantized(unpack_codes(self.weight, self.columns, self.packing), self.weight_scale)

    def _apply(self, fn, recurse=True):
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:  # .to(bf16) moves the layer but must not round its scales
            self.weight_scale = scale.to(self.weight_scale.device)
        return self


class PackedLinear(_PackedMixin, nn.Module):
    """Linear layer of packed codes. Not an nn.Linear: there is no float weight to train, merge or cast.

    A decoder tied to the word embedding (`source`, as in `QuantLinear`) has no bits of its own.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: WeightSpec,
        activation: ActivationQuantizer | None,
        packing: str,
        tied: bool = False,
        device=None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.source: tuple[PackedEmbedding, ...] = ()
        self._init_packed(out_features, in_features, spec, packing, device)
        if tied:
            del self.weight, self.weight_scale
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        self.activation, self.token_mask, self._codes = activation, None, None

    def forward(self, x: Tensor) -> Tensor:
        weight, sums = self._runtime_weight()
        return _linear(self, x, None, weight, sums)

    def _runtime_weight(self) -> tuple[Quantized, Tensor | None]:
        """Codes, scale and scaled sums of codes. int8 codes (a quarter of fp32) and sums are kept after the first use
        where an integer product uses them; otherwise every use unpacks."""
        if self._codes is not None:
            codes, sums = self._codes
            return Quantized(codes, (self.source[0] if self.source else self).weight_scale), sums
        weight = self.quantize_weight()
        if self.activation is None or torch.compiler.is_compiling():
            return weight, None
        if has_fast_int8(weight.codes.device):
            self._codes = (weight.codes, scaled_code_sums(weight, self.spec.bound, self.spec.group_size))
        return weight, None

    def quantize_weight(self) -> Quantized:
        return self.source[0].quantize_weight() if self.source else super().quantize_weight()

    def _apply(self, fn, recurse=True):
        self._codes = None
        return nn.Module._apply(self, fn, recurse) if self.source else super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_codes": None}

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._codes = None
        super()._load_from_state_dict(*args, **kwargs)

    def load_quantized(self, quantized: Quantized) -> None:
        super().load_quantized(quantized)
        self._codes = None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec}, packing={self.packing}"


class PackedEmbedding(_PackedMixin, nn.Module):
    """Embedding of packed codes; only the rows looked up are unpacked. It answers in `dtype`, which a cast changes."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        spec: WeightSpec,
        packing: str,
        padding_idx: int | None = None,
        device=None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.dtype = dtype
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self._init_packed(num_embeddings, embedding_dim, spec, packing, device)

    def forward(self, input_ids: Tensor) -> Tensor:
        check_ids(input_ids, self.num_embeddings)
        rows = input_ids.flatten()
        scale = self.weight_scale if self.weight_scale.shape[0] == 1 else self.weight_scale[rows]
        codes = unpack_codes(self.weight[rows], self.columns, self.packing)
        value = dequantize_weight(Quantized(codes, scale), self.spec.group_size)
        return value.view(*input_ids.shape, self.embedding_dim).to(self.dtype)

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.spec}, packing={self.packing}"


@torch.no_grad()
def pack_layer(layer: nn.Module, packing: str) -> PackedLinear | PackedEmbedding:
    """Packed layer of the codes and scales that a latent or packed layer computes with."""
    packed = empty_packed_layer(layer, packing)
    if not getattr(layer, "source", ()):
        packed.load_quantized(layer.quantize_weight())
    if isinstance(packed, PackedLinear) and layer.bias is not None:
        packed.bias = nn.Parameter(layer.bias.detach().clone())
    return packed


def empty_packed_layer(layer: nn.Module, packing: str) -> PackedLinear | PackedEmbedding:
    """Packed layer of the shape of a latent or packed one, on its device, still without weights."""
    source = getattr(layer, "source", ())
    device = (source[0] if source else layer).weight.device
    if isinstance(layer, QuantLinear | PackedLinear):
        return PackedLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            layer.spec,
            layer.activation,
            packing,
            tied=bool(source),
            device=device,
        )
    return PackedEmbedding(
        layer.num_embeddings,
        layer.embedding_dim,
        layer.spec,
        packing,
        padding_idx=layer.padding_idx,
        device=device,
        dtype=layer.dtype if isinstance(layer, PackedEmbedding) else layer.weight.dtype,
    )
