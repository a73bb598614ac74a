"""Where the zoo meets Transformers: the `qbert` quantizer, strict loading, and the Auto and attention registries."""

import os
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.masking_utils import eager_mask
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from .attention import quantized_attention
from .checkpoint import (
    QUANTIZER_STATE,
    WEIGHTS_FILE,
    CheckpointError,
    Expected,
    PackedFile,
    check_config,
    check_digests,
    check_tensors,
    file_metadata,
    open_packed,
)
from .configuration_qbert import low_bit_fields
from .layers import PackedEmbedding, PackedLinear, QuantEmbedding, QuantLinear, empty_packed_layer
from .packing import FORMAT_VERSION, PACKINGS


class QbertConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint: how bits lie in the file. What they mean is in the model config.

    Args:
        packing (`"2bit"` or `"dense"`, *optional*, defaults to `"2bit"`): layout of ternary codes.
        format_version (`int`, *optional*): version of the file format.
    """

    def __init__(self, packing: str = "2bit", format_version: int = FORMAT_VERSION, **kwargs):
        self.quant_method = "qbert"
        self.packing, self.format_version = packing, format_version
        unknown = set(kwargs) - {"quant_method"}
        if unknown or packing not in PACKINGS or format_version != FORMAT_VERSION:
            found = {"packing": packing, "format_version": format_version, **{key: kwargs[key] for key in unknown}}
            raise CheckpointError(
                f"config.json: quantization_config must have packing in {PACKINGS} and format_version "
                f"{FORMAT_VERSION}, found {found}"
            )


class QbertQuantizer(HfQuantizer):
    """Builds the packed layers of a low-bit model on the meta device and checks the file before it is read."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: list[str] | None = None, **_):
        if not hasattr(model, "pack"):
            raise CheckpointError(
                f"{model.config.name_or_path}/config.json: quantization_config belongs to a low-bit model; "
                f"{type(model).__name__} (model_type {model.config.model_type!r}) is not one"
            )
        if not self.pre_quantized:
            raise ValueError("load the latent model and call `.pack()`: packing needs no quantization_config")
        swap_to_packed(model, self.quantization_config.packing)
        if checkpoint_files is not None:
            names = [os.path.basename(path) for path in checkpoint_files]
            if names != [WEIGHTS_FILE]:
                folder = os.path.dirname(checkpoint_files[0])
                raise CheckpointError(f"{folder}: a packed checkpoint is one file {WEIGHTS_FILE}, found {names}")
            self.float_dtypes = check_file(checkpoint_files[0], model, self.quantization_config.packing).float_dtypes

    def _process_model_after_weight_loading(self, model: nn.Module, **_):
        model.requires_grad_(False)  # as `pack()` leaves them: what trains is an adapter
        model.base_model.hf_quantizer = self  # so that the backbone alone is saved as a packed one, too

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        if getattr(model, "_hf_peft_config_loaded", False):  # only adapters are saved
            return None, {}
        tied = set(model.all_tied_weights_keys)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        config = model.config
        fields = config.compute_fields() | {"num_labels": config.num_labels}
        return None, file_metadata(tensors, self.quantization_config.packing, type(model).__name__, fields)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # by adapters only: Transformers refuses to train a quantized model that has none

    @property
    def is_compileable(self) -> bool:
        return True


def swap_to_packed(model: nn.Module, packing: str) -> None:
    """Replace every latent layer by an empty packed one on the same device."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear | QuantEmbedding):
            model.set_submodule(name, empty_packed_layer(module, packing))
    link_decoder(model)


def link_decoder(model: nn.Module) -> None:
    """Point a packed tied decoder to the packed word embedding, and take it off the list of tied parameters."""
    decoder, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(decoder, PackedLinear) and isinstance(embedding, PackedEmbedding):
        decoder.source = (embedding,)
        name = next(name for name, module in model.named_modules() if module is decoder)
        tied = {target: source for target, source in model.all_tied_weights_keys.items() if target != f"{name}.weight"}
        model.all_tied_weights_keys = model._tied_weights_keys = tied


def expected_tensors(model: nn.Module) -> dict[str, Expected]:
    """Name -> what a packed file must hold for this packed model (any device, meta included)."""
    kinds = PackedLinear | PackedEmbedding
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    expected = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        owner, _, leaf = name.rpartition(".")
        layer = layers.get(owner)
        if layer is not None and leaf == "weight":
            expected[name] = Expected(tuple(tensor.shape), layer.columns, layer.packing, dtype=torch.uint8)
        else:
            is_scale = (layer is not None and leaf == "weight_scale") or name.endswith("_quantizer.step")
            dtype = torch.float32 if name.endswith(QUANTIZER_STATE) else None
            if layer is not None and leaf == "weight_scale":
                dtype = layer.spec.scale_dtype
            expected[name] = Expected(tuple(tensor.shape), is_scale=is_scale, dtype=dtype)
    return expected


def check_file(path: str, model: nn.Module, packing: str) -> PackedFile:
    """Every check of a packed file against the packed model about to be filled from it; raises `CheckpointError`.

    The file's own head must match tensor by tensor. Another head may be asked for: then every packed tensor must be
    there, and what the new head lacks of others is initialised and reported by Transformers, as usual.
    """
    file = open_packed(path)
    expected = expected_tensors(model)
    architecture, declared = file.metadata["qbert_architecture"], getattr(model.config, "architectures", None)
    if declared and architecture not in declared:
        raise file.fail(f"was saved from {architecture}, config.json says {declared}")
    same_head = architecture == type(model).__name__
    prefix = model.base_model_prefix + "."
    if not same_head:
        file_has_prefix = any(name.startswith(prefix) for name in file.tensors)
        model_has_prefix = any(name.startswith(prefix) for name in expected)
        if file_has_prefix and not model_has_prefix:
            expected = {prefix + name: want for name, want in expected.items()}
        elif model_has_prefix:
            packed_head = [name for name, want in expected.items() if want.packing and not name.startswith(prefix)]
            if any(name not in file.tensors for name in packed_head):
                raise file.fail(
                    f"has no packed tensors {packed_head} for {type(model).__name__}; start from a latent model"
                )
            expected = {name: want for name, want in expected.items() if name.startswith(prefix)}
            if not file_has_prefix:
                expected = {name.removeprefix(prefix): want for name, want in expected.items()}
    missing = sorted(set(expected) - set(file.tensors))
    unexpected = sorted(set(file.tensors) - set(expected)) if same_head else []
    if missing or unexpected:
        hint = ""
        for wrapper in ("module.", "_orig_mod."):
            if any(name.startswith(wrapper) for name in unexpected):
                hint = f"; save the unwrapped model (names start with {wrapper!r})"
        if missing and all(".pooler." in "." + name for name in missing):
            hint = f"; {architecture} has no pooler: load with add_pooling_layer=False"
        raise file.fail(
            f"{len(missing)} tensors missing {missing[:5]}, {len(unexpected)} unexpected {unexpected[:5]}{hint}"
        )
    if file.metadata["qbert_packing"] != packing:
        raise file.fail(f"packing is {file.metadata['qbert_packing']!r}, config.json says {packing!r}")
    fields = model.config.compute_fields() | {"num_labels": model.config.num_labels}
    defaults = {name: getattr(type(model.config), name, None) for name in low_bit_fields(type(model.config))}
    check_config(file, fields, defaults, frozenset() if same_head else frozenset({"num_labels"}))
    check_digests(file)
    check_tensors(file, expected)
    return file


MODEL_CLASSES: dict[str, type] = {}  # architecture -> class, of every registered family


_IS_REMOTE_CODE = __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
_BACKBONES = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra"}
_HEADS = {
    "base": ("Model", AutoModel),
    "masked-lm": ("ForMaskedLM", AutoModelForMaskedLM),
    "sequence-classification": ("ForSequenceClassification", AutoModelForSequenceClassification),
    "token-classification": ("ForTokenClassification", AutoModelForTokenClassification),
    "multiple-choice": ("ForMultipleChoice", AutoModelForMultipleChoice),
    "question-answering": ("ForQuestionAnswering", AutoModelForQuestionAnswering),
}


def register_family(family: str, module: dict[str, Any]) -> dict[str, dict[str, type]]:
    """Register a family with the Auto classes: `<family><Backbone><Head>` of a module's `globals()`.

    Every saved model carries its code (Transformers copies the files of classes with an `_auto_class`), and
    `remote_code` of its config class names all heads, so that any Auto class opens it with `trust_remote_code=True`.
    Code that came with a checkpoint registers nothing: it serves that checkpoint; an installed package is in charge.

    Returns backbone -> head -> class.
    """
    heads = {
        backbone: {head: module[f"{family}{name}{suffix}"] for head, (suffix, _) in _HEADS.items()}
        for backbone, name in _BACKBONES.items()
    }
    for classes in heads.values():
        config = classes["base"].config_class
        config._auto_class, config.remote_code = "AutoConfig", {"AutoConfig": _place(config)}
        if not _IS_REMOTE_CODE:
            AutoConfig.register(config.model_type, config, exist_ok=True)
        for head, model_class in classes.items():
            auto_class = _HEADS[head][1]
            MODEL_CLASSES[model_class.__name__] = model_class
            model_class._auto_class = auto_class.__name__
            config.remote_code[auto_class.__name__] = _place(model_class)
            if not _IS_REMOTE_CODE:
                auto_class.register(config, model_class, exist_ok=True)
    return heads


def _place(kind: type) -> str:
    """module.Class as `auto_map` wants it."""
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


def register_quantizer() -> None:
    """Point Transformers to the quantizer of this copy of the code: with remote code there may be several, each with
    layer classes of its own, so every load does this first."""
    AUTO_QUANTIZATION_CONFIG_MAPPING["qbert"] = QbertConfig
    AUTO_QUANTIZER_MAPPING["qbert"] = QbertQuantizer


register_quantizer()


def _attention(module: nn.Module, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """The module's own function: checkpoints may bring copies of this code, each with quantizer classes of its own."""
    return getattr(module, "quantized_attention", quantized_attention)(module, *args, **kwargs)


# A full-precision teacher has no function of its own: with an installed package it gets that one's, whatever copies
# are imported before or after.
_ATTENTION = {"qbert": _attention, "qbert_scores": partial(_attention, return_scores=True)}
for _name, _function in _ATTENTION.items():
    if not (_IS_REMOTE_CODE and _name in AttentionInterface()):
        AttentionInterface.register(_name, _function)
        # Without its mask function padding would silently be attended to.
        AttentionMaskInterface.register(_name, eager_mask)
