"""Width pruning (DynaBERT, Hou et al., NeurIPS 2020): importance, rewiring, leading sub-networks, their distillation.

Attention heads and feed-forward neurons of every encoder layer are sorted by importance; a network of width w is then
the leading round(w * heads) heads and the same share of neurons. Hidden size, embeddings, pooler and classifier stay.

Shapes: L layers, H heads, D head dim, F feed-forward neurons, C hidden size, B batch, T tokens.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    AutoConfig,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_qbert import get_model_class

from .distillation import DistillationArguments, DistillationTrainer


FULL_PRECISION = "32-32-32"

# Tensor of an encoder layer -> what its rows (0) or columns (1) belong to. Named so in BERT, RoBERTa and ELECTRA.
_AXES = {
    **{f"attention.self.{part}.weight": ("heads", 0) for part in ("query", "key", "value")},
    **{f"attention.self.{part}.bias": ("heads", 0) for part in ("query", "key", "value")},
    "attention.output.dense.weight": ("heads", 1),
    "intermediate.dense.weight": ("neurons", 0),
    "intermediate.dense.bias": ("neurons", 0),
    "output.dense.weight": ("neurons", 1),
}
# The layer's other tensors, all (C,).
_UNTOUCHED = (
    "attention.output.dense.bias",
    "attention.output.LayerNorm.weight",
    "attention.output.LayerNorm.bias",
    "output.dense.bias",
    "output.LayerNorm.weight",
    "output.LayerNorm.bias",
)
_IN_LAYER = re.compile(r"((?:.*\.)?)encoder\.layer\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Importance:
    """First-order estimate of how the task loss changes without a head (L, H) or a neuron (L, F); at least 0."""

    heads: Tensor
    neurons: Tensor


def load_full_precision(folder: str, family: str = "binary") -> PreTrainedModel:
    """A fine-tuned sequence classifier in a low-bit class with bits 32-32-32, in which it can be pruned.

    Args:
        folder: checkpoint of a plain BERT, RoBERTa or ELECTRA, or of a low-bit class in full precision.
        family: whose class a plain model gets.

    Raises:
        ValueError: the checkpoint is quantized, of another backbone, or lacks a tensor.
    """
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "bits", FULL_PRECISION) != FULL_PRECISION:
        raise ValueError(f"{folder}/config.json: field 'bits' must be {FULL_PRECISION} to prune, found {config.bits}")
    own_family, _, backbone = config.model_type.rpartition("_")
    model_class = get_model_class(own_family or family, backbone, "sequence-classification")
    model, info = model_class.from_pretrained(
        folder, bits=FULL_PRECISION, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{folder}: expected a fine-tuned classifier, its tensors {sorted(info['missing_keys'])} are missing"
        )
    return model


def labelled_batches(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32
) -> Iterator[dict[str, Tensor]]:
    """Padded batches with `labels` of a tokenized split (`trainers.data.tokenize`), in its order."""
    collate = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(dataset), batch_size):
        yield dict(collate([dataset[row] for row in range(start, min(start + batch_size, len(dataset)))]))


def head_and_neuron_importance(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Importance:
    """First-order Taylor scores (Molchanov et al., 2017) of the loss on labels, in evaluation mode.

    Head h: |dL/dm_h| with m_h = 1 multiplying its context. Neuron j: |sum_i W1[j,i] dL/dW1[j,i] + b1[j] dL/db1[j]| +
    |sum_i W2[i,j] dL/dW2[i,j]|, which are the gradients of factors of 1 before and after its activation function. The
    gradient is summed over the tokens of a batch with its sign, the absolute values over batches. Every batch has
    gradients of its own; DynaBERT's released code never clears them and so adds up running sums.

    Args:
        model: a task model of a BERT, RoBERTa or ELECTRA backbone. Neither its weights nor its gradients change.
        batches: inputs of the model with labels.

    Raises:
        ValueError: there is no batch, a batch has no labels, or a score is not finite.
    """
    config, device = model.config, model.device
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    factors = {
        "context": torch.ones(layers, heads, 1, device=device, requires_grad=True),
        "before": torch.ones(layers, config.intermediate_size, device=device, requires_grad=True),
        "after": torch.ones(layers, config.intermediate_size, device=device, requires_grad=True),
    }
    sums = {name: torch.zeros_like(factor, requires_grad=False) for name, factor in factors.items()}
    seen = 0
    with evaluating(model), torch.enable_grad(), _factors_inserted(model, factors):
        for batch in batches:
            loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
            if loss is None:
                raise ValueError(f"importance needs labels, found a batch of {sorted(batch)}")
            for name, gradient in zip(factors, torch.autograd.grad(loss, list(factors.values()))):
                sums[name] += gradient.abs()
            seen += 1
    if not seen:
        raise ValueError("importance needs at least one batch, found none")
    importance = Importance(sums["context"].squeeze(-1).cpu(), (sums["before"] + sums["after"]).cpu())
    for name, scores in vars(importance).items():
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"importance: scores of {name} are not finite; so is the loss or a weight")
    return importance


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode for a `with` block."""
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in zip(models, training):
            model.train(mode)


@contextmanager
def _factors_inserted(model: PreTrainedModel, factors: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiplies every layer's context by its heads' factors and its neurons by theirs, for a `with` block."""

    def scale_context(layer):
        def hook(module, args):  # noqa: ARG001
            factor = factors["context"][layer]
            return (args[0].unflatten(-1, (factor.shape[0], -1)) * factor).flatten(-2)

        return hook

    def scale_before(layer):
        return lambda module, args, output: output * factors["before"][layer]  # noqa: ARG005

    def scale_after(layer):
        return lambda module, args: args[0] * factors["after"][layer]  # noqa: ARG005

    handles = []
    try:
        for index, layer in enumerate(model.base_model.encoder.layer):
            handles.append(layer.attention.output.dense.register_forward_pre_hook(scale_context(index)))
            handles.append(layer.intermediate.dense.register_forward_hook(scale_before(index)))
            handles.append(layer.output.dense.register_forward_pre_hook(scale_after(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def rewire(state_dict: Mapping[str, Tensor], config: PreTrainedConfig, importance: Importance) -> dict[str, Tensor]:
    """The same network with the heads and neurons of every layer in decreasing importance, equal ones in their order.

    Raises:
        ValueError: a tensor of an encoder layer is missing, unknown or of another shape, or so are the scores.
    """
    axes = _pruned_axes(state_dict, config)
    found = {name: tuple(scores.shape) for name, scores in vars(importance).items()}
    layers = config.num_hidden_layers
    expected = {"heads": (layers, config.num_attention_heads), "neurons": (layers, config.intermediate_size)}
    if found != expected:
        raise ValueError(f"importance: expected scores of shape {expected}, found {found}")
    order = {what: scores.argsort(dim=-1, descending=True, stable=True) for what, scores in vars(importance).items()}
    columns = torch.arange(config.num_attention_heads * _head_dim(config)).view(config.num_attention_heads, -1)
    order["heads"] = columns[order["heads"]].flatten(1)
    rewired = dict(state_dict)
    for name, (layer, what, dim) in axes.items():
        tensor = state_dict[name]
        rewired[name] = tensor.index_select(dim, order[what][layer].to(tensor.device))
    return rewired


def cut(
    state_dict: Mapping[str, Tensor], config: PreTrainedConfig, width: float
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The leading sub-network of that width: its tensors (those cut are copies) and the config fields that change.

    Only a config that has `head_dim` describes it; that of a low-bit family does.

    Raises:
        ValueError: `width` leaves no head or no neuron, or a tensor of an encoder layer is missing, unknown or of
            another shape.
    """
    fields = _narrow_fields(config, width)
    axes = _pruned_axes(state_dict, config)
    views = _leading_views(state_dict, axes, fields)
    return {name: view.clone() if name in axes else view for name, view in views.items()}, fields


def subnetwork(model: PreTrainedModel, width: float) -> PreTrainedModel:
    """A model of its own: the leading sub-network of that width of a full-precision model of a low-bit class."""
    state_dict, fields = cut(model.state_dict(), model.config, width)
    narrow = type(model)(_narrow_config(model, fields)).to(device=model.device, dtype=model.dtype)
    narrow.load_state_dict(state_dict)
    return narrow.train(model.training)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _narrow_fields(config: PreTrainedConfig, width: float) -> dict[str, int]:
    """Config fields of a sub-network. Heads are rounded as DynaBERT's code does, halves to the even number."""
    if not 0 < width <= 1:
        raise ValueError(f"width: expected a number above 0 and at most 1, found {width}")
    heads = round(width * config.num_attention_heads)
    neurons = heads * config.intermediate_size // config.num_attention_heads
    if not heads or not neurons:
        raise ValueError(
            f"width: {width} of {config.num_attention_heads} heads and {config.intermediate_size} neurons leaves "
            f"{heads} and {neurons}"
        )
    return {"num_attention_heads": heads, "head_dim": _head_dim(config), "intermediate_size": neurons}


def _narrow_config(model: PreTrainedModel, fields: Mapping[str, int]) -> PreTrainedConfig:
    bits = getattr(model.config, "bits", None) if hasattr(type(model).config_class, "bits") else None
    if bits != FULL_PRECISION:
        found = type(model).__name__ + ("" if bits is None else f" with bits {bits}")
        raise ValueError(f"a sub-network needs a model of a low-bit class with bits {FULL_PRECISION}, found {found}")
    config = type(model.config).from_dict(model.config.to_dict() | fields)
    config._attn_implementation = model.config._attn_implementation
    return config


def _pruned_axes(tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> dict[str, tuple[int, str, int]]:
    """Name -> (layer, "heads" or "neurons", dim) of every tensor that has such rows or columns, checked."""
    matches = {name: match for name in tensors if (match := _IN_LAYER.fullmatch(name))}
    prefixes = {match[1] for match in matches.values()}
    if len(prefixes) != 1:
        raise ValueError(f"expected tensors of one encoder (encoder.layer.N...), found those of {sorted(prefixes)}")
    (prefix,) = prefixes
    sizes = {"heads": config.num_attention_heads * _head_dim(config), "neurons": config.intermediate_size}
    axes, shapes = {}, {}
    for layer in range(config.num_hidden_layers):
        start = f"{prefix}encoder.layer.{layer}."
        shapes |= {start + leaf: (config.hidden_size,) for leaf in _UNTOUCHED}
        for leaf, (what, dim) in _AXES.items():
            axes[start + leaf] = (layer, what, dim)
            shape = (sizes[what], config.hidden_size) if leaf.endswith("weight") else (sizes[what],)
            shapes[start + leaf] = shape[::-1] if dim else shape
    missing, unknown = sorted(shapes.keys() - matches.keys()), sorted(matches.keys() - shapes.keys())
    if missing or unknown:
        raise ValueError(
            f"the encoder's tensors are not those of {config.num_hidden_layers} full-precision layers: "
            f"missing {missing[:3]}, unknown {unknown[:3]}"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {tuple(tensors[name].shape)}")
    return axes


def _leading_views(
    tensors: Mapping[str, Tensor], axes: Mapping[str, tuple[int, str, int]], fields: Mapping[str, int]
) -> dict[str, Tensor]:
    """Every tensor, those of `axes` narrowed to their leading rows or columns; views, gradients flow through them."""
    sizes = {"heads": fields["num_attention_heads"] * fields["head_dim"], "neurons": fields["intermediate_size"]}
    return {
        name: tensor.narrow(axes[name][2], 0, sizes[axes[name][1]]) if name in axes else tensor
        for name, tensor in tensors.items()
    }


class WidthAdaptiveTrainer(DistillationTrainer):
    """Distils into a full-precision network and its leading sub-networks at once (DynaBERT, section 2.2).

    In every step the losses of all widths are summed. Sub-networks run on views of the full network's parameters, so
    that these gather all gradients, and a checkpoint is one of the full network: cut it with `subnetwork`. Evaluation
    is that of the full width. The logged terms are summed over the widths, too.

    DynaBERT's targets are logits 1 and hidden states 0.1. Its code leaves out the logits of regression tasks; here
    they have their squared error, as in every other stage.

    Args:
        model: a student of a low-bit class with bits 32-32-32, rewired.
        widths: shares of the heads, 1 among them; see `cut`.
        kwargs: as for `DistillationTrainer`.

    Raises:
        ValueError: a width or the student is none of these, or attention scores are a target: networks of different
            widths have different numbers of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        args: DistillationArguments,
        *,
        widths: Sequence[float],
        identity: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        if args.attention_scores_weight:
            raise ValueError(
                "attention_scores: a narrower network has fewer heads than its teacher; expected "
                f"attention_scores_weight 0, found {args.attention_scores_weight}"
            )
        if 1 not in widths or len(set(widths)) < len(widths):
            raise ValueError(f"widths: expected different numbers, 1 among them, found {list(widths)}")
        self._axes = _pruned_axes(dict(model.named_parameters()), model.config)
        self._narrow = []  # (fields, a network without memory that runs on views)
        for width in widths:
            fields = _narrow_fields(model.config, width)
            config = _narrow_config(model, fields)
            if width != 1:
                with torch.device("meta"):
                    narrow = type(model)(config)
                for module in narrow.modules() if args.without_dropout else ():
                    if isinstance(module, nn.Dropout):
                        module.p = 0.0
                self._narrow.append((fields, narrow))
        super().__init__(model, teacher, args, identity={**(identity or {}), "widths": list(widths)}, **kwargs)

    def _student_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> list[Any]:
        outputs = super()._student_outputs(model, inputs)
        parameters, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        for fields, narrow in self._narrow:
            tensors = _leading_views(parameters, self._axes, fields) | buffers
            with self.accelerator.autocast():
                outputs.append(functional_call(narrow.train(), tensors, kwargs=inputs))
        return outputs
