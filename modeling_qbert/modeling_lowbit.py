"""What every low-bit model adds to its Transformers class: quantized layers, packing, strict loading."""

import copy
import os
import tempfile
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation
from transformers.models.bert.modeling_bert import BertLayer, BertPooler
from transformers.models.electra.modeling_electra import (
    ElectraClassificationHead,
    ElectraLayer,
    ElectraSequenceSummary,
)
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead, RobertaLayer, RobertaPooler

from .attention import quantized_attention  # noqa: F401 (registers the attention functions)
from .checkpoint import WEIGHTS_FILE, CheckpointError, canonicalize_header, check_folder, stale_weights
from .configuration_qbert import low_bit_fields
from .integration import QbertConfig, QbertQuantizer, link_decoder, own_memory
from .layers import (
    FixedGELU,
    FixedLayerNorm,
    PackedEmbedding,
    PackedLinear,
    QuantEmbedding,
    QuantLinear,
    pack_layer,
)
from .ops import dequantize_weight
from .packing import PACKINGS


# Modules all of whose linear layers are quantized, and modules that do the pooler's work: a dense layer and its
# activation between encoder and classifier (the pooler is quantized in TernaryBERT's code; the classifier is not).
_ENCODER_LAYERS = (BertLayer, RobertaLayer, ElectraLayer)
_POOLERS = (BertPooler, RobertaPooler, RobertaClassificationHead, ElectraClassificationHead)


def check_inputs(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Pre-forward hook of the backbone: clear errors for shapes that it cannot take."""
    given = kwargs.get("input_ids", args[0] if args else None)
    given = kwargs.get("inputs_embeds") if given is None else given
    if given is None or torch.compiler.is_compiling():
        return
    if given.dim() < 2 or 0 in given.shape:
        raise ValueError(f"input_ids must be (B, T), at least one sentence of one token, found {list(given.shape)}")
    positions = module.embeddings.position_embeddings
    limit = positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1)
    if given.shape[1] > limit:
        raise ValueError(f"input has {given.shape[1]} tokens, this model has {limit} positions; truncate the text")
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if mask is not None and mask.dim() == 2 and mask.shape != given.shape[:2]:
        raise ValueError(f"attention_mask must be {list(given.shape[:2])} as the input, found {list(mask.shape)}")


def share_token_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Pre-forward hook of the backbone when a range spans the batch: tells linear layers which tokens are padding."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    mask = mask.bool() if mask is not None and mask.dim() == 2 else None
    for layer in module.modules():
        if isinstance(layer, QuantLinear | PackedLinear):
            layer.token_mask = mask


class LowBitMixin:
    """Mixed in before a Transformers BERT, RoBERTa or ELECTRA class.

    latent: `QuantLinear` and `QuantEmbedding` hold fp32 latent weights under the backbone's own names and
    fake-quantize in forward. packed: after `pack()`, or loaded from a packed checkpoint, they hold bits and scales.
    """

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self._insert_quantizers()

    def _insert_quantizers(self) -> None:
        weight, embedding, activation = (
            self.config.weight_spec,
            self.config.embedding_spec,
            self.config.activation_quantizer_spec,
        )
        if weight is not None:
            for owner in self.modules():
                if isinstance(owner, ElectraSequenceSummary) and isinstance(owner.summary, nn.Linear):
                    owner.summary = QuantLinear(owner.summary, weight, activation)
                elif isinstance(owner, _POOLERS):
                    owner.dense = QuantLinear(owner.dense, weight, activation)
            for owner in [module for module in self.modules() if isinstance(module, _ENCODER_LAYERS)]:
                for name, linear in list(owner.named_modules()):
                    if type(linear) is nn.Linear:
                        owner.set_submodule(name, QuantLinear(linear, weight, activation))
        if embedding is not None:
            decoder = self.get_output_embeddings()
            embeddings = QuantEmbedding(self.get_input_embeddings(), embedding)
            self.set_input_embeddings(embeddings)
            if decoder is not None and self.config.tie_word_embeddings:
                name = next(name for name, module in self.named_modules() if module is decoder)
                self.set_submodule(name, QuantLinear(decoder, embedding, activation, (embeddings,)))
        if activation is not None:  # a code must not depend on how a kernel rounds
            for name, module in list(self.base_model.named_modules()):
                if type(module) is nn.LayerNorm:
                    self.base_model.set_submodule(name, FixedLayerNorm(module))
                elif isinstance(getattr(module, "intermediate_act_fn", None), GELUActivation):
                    module.intermediate_act_fn = FixedGELU()
        self.base_model.register_forward_pre_hook(check_inputs, with_kwargs=True)
        if self.config.activation_granularity == "per_tensor" and activation is not None:
            self.base_model.register_forward_pre_hook(share_token_mask, with_kwargs=True)
        self.update_scales(None)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        if self.config.activation_quantizer_spec is None or attn_implementation in ("qbert", "qbert_scores"):
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        if attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                f"attn_implementation {attn_implementation!r} would not quantize Q, K, V and probabilities; "
                "a model with quantized activations has 'qbert' (the default) or 'qbert_scores'"
            )
        return super()._check_and_adjust_attn_implementation("qbert", *args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        # A full-precision checkpoint has no loss-aware scales: they are not missing, `update_scales` computes them.
        scales = {name for name in loading_info.missing_keys if name.endswith(".weight_scale")}
        for name in scales:
            self.get_buffer(name).zero_()
        loading_info.missing_keys = loading_info.missing_keys - scales
        super()._adjust_missing_and_unexpected_keys(loading_info)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As `PreTrainedModel.from_pretrained`, strict: a missing backbone tensor is an error that names it."""
        source = os.path.join(str(pretrained_model_name_or_path), *filter(None, [kwargs.get("subfolder")]))
        if os.path.isfile(os.path.join(source, "config.json")):
            check_folder(source)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except (ValueError, SafetensorError, RuntimeError) as error:
            foreign = isinstance(error, RuntimeError) and "mismatch" not in str(error)
            if foreign or (isinstance(error, CheckpointError) and source in str(error)):
                raise
            raise CheckpointError(f"{source}: {error}") from error
        types = getattr(getattr(model, "hf_quantizer", None), "float_dtypes", {model.dtype})
        if kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) in ("auto", None) and model.dtype not in types:
            raise CheckpointError(f"{source}/config.json: field 'dtype' is {model.dtype}, the file holds {types}")
        prefix = "" if model.base_model is model else model.base_model_prefix + "."
        missing = sorted(
            name for name in info["missing_keys"] if name.startswith(prefix) and ".pooler." not in "." + name
        )
        if missing:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: {len(missing)} tensors of the {model.base_model_prefix} "
                f"backbone are missing: {missing[:5]}"
            )
        own_memory(model)
        model.update_scales(None)
        return (model, info) if output_loading_info else model

    @property
    def is_packed(self) -> bool:
        """Whether this model holds bits instead of latent weights."""
        return getattr(self, "hf_quantizer", None) is not None

    @torch.no_grad()
    def update_scales(self, second_moments: Mapping[str, Tensor] | None) -> None:
        """Refresh the scales of loss-aware layers; nothing to do for others.

        Args:
            second_moments: parameter name -> Adam's second moment of that weight (O, I). `None` only computes scales
                that were never computed, with curvature 1.
        """
        for name, module in self.named_modules():
            scale = getattr(module, "weight_scale", None)
            if not isinstance(module, QuantLinear | QuantEmbedding) or scale is None or scale.device.type == "meta":
                continue
            if second_moments is None and bool((scale > 0).all()):
                continue
            module.update_scale(None if second_moments is None else second_moments.get(f"{name}.weight"))

    @torch.no_grad()
    def pack(self, packing: str = "2bit") -> PreTrainedModel:
        """A packed copy of this model: same codes, same scales, same logits.

        Args:
            packing: layout of ternary codes, `"2bit"` (4 codes a byte) or `"dense"` (5 codes a byte).

        Called on a packed model it changes the layout.
        """
        if packing not in PACKINGS:
            raise ValueError(f"packing must be one of {PACKINGS}, found {packing!r}")
        if self.config.weight_spec is None and self.config.embedding_spec is None:
            raise ValueError(f"config field `bits` is {self.config.bits!r}: there is nothing to pack")
        model = copy.deepcopy(self).eval()
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear | QuantEmbedding | PackedLinear | PackedEmbedding):
                model.set_submodule(name, pack_layer(module, packing))
        link_decoder(model)
        model.tie_weights()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.hf_quantizer = QbertQuantizer(QbertConfig(packing=packing), pre_quantized=True)
        model.is_quantized, model.quantization_method = True, "qbert"
        model.hf_quantizer.postprocess_model(model)
        return model

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A plain Transformers model whose weights are scale * codes; its activations are full precision."""
        original = next(base for base in type(self).__mro__ if base.__module__.startswith("transformers."))
        fields = self.config.to_dict()
        for name in (*low_bit_fields(), "quantization_config", "model_type", "architectures", "dtype"):
            fields.pop(name, None)
        model = original(original.config_class(**fields))
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.endswith("weight_scale")}
        for name, module in self.named_modules():
            if isinstance(module, QuantLinear | QuantEmbedding | PackedLinear | PackedEmbedding):
                state[f"{name}.weight"] = dequantize_weight(module.quantize_weight(), module.spec.group_size)
        model.load_state_dict(state)
        return model.to(device=self.device, dtype=dtype).eval()

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs) -> None:
        """As `PreTrainedModel.save_pretrained`. A packed model is written beside its target and then moved into place,
        and the same model gives the same bytes."""
        if not self.is_packed:
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        save_directory = os.fspath(save_directory)
        os.makedirs(save_directory, exist_ok=True)
        foreign = stale_weights(save_directory)
        if foreign:
            raise CheckpointError(f"{save_directory}: holds other weight files {foreign}; save to a clean folder")
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=save_directory) as staging:
            super().save_pretrained(staging, *args, max_shard_size="1000GB", **kwargs)
            canonicalize_header(os.path.join(staging, WEIGHTS_FILE))
            for name in sorted(os.listdir(staging), key=lambda name: name != WEIGHTS_FILE):
                os.replace(os.path.join(staging, name), os.path.join(save_directory, name))
        if push_to_hub:
            self.push_to_hub(repo_id)
        return None
