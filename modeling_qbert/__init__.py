"""Low-bit BERTs for Transformers. Importing this package registers every family with the Auto classes."""

from . import modeling_binary, modeling_ghost, modeling_ternary
from .checkpoint import CheckpointError
from .configuration_qbert import (
    BinaryBertConfig,
    BinaryElectraConfig,
    BinaryRobertaConfig,
    GhostBertConfig,
    GhostElectraConfig,
    GhostRobertaConfig,
    TernaryBertConfig,
    TernaryElectraConfig,
    TernaryRobertaConfig,
)
from .layers import FastDropout
from .modeling_binary import *  # noqa: F403
from .modeling_ghost import *  # noqa: F403
from .modeling_ternary import *  # noqa: F403
from .onnx_export import export_onnx, onnx_operators
from .quantizers import quantize_bwn, quantize_twn
from .remote import write_remote_code
from .report import checkpoint_report, format_report, ghost_parameters, multiply_adds, verify_checkpoint


_FAMILIES = {"ternary": modeling_ternary.HEADS, "binary": modeling_binary.HEADS, "ghost": modeling_ghost.HEADS}


def get_model_class(family: str, backbone: str, head: str) -> type:
    """The class of a family ("ternary", "binary", "ghost"), a backbone ("bert", "roberta", "electra") and a head
    ("base", "masked-lm", "sequence-classification", "token-classification", "multiple-choice",
    "question-answering")."""
    for name, value, known in (("family", family, _FAMILIES), ("backbone", backbone, _FAMILIES.get(family, {}))):
        if value not in known:
            raise ValueError(f"{name} must be one of {sorted(known)}, found {value!r}")
    heads = _FAMILIES[family][backbone]
    if head not in heads:
        raise ValueError(f"head must be one of {sorted(heads)}, found {head!r}")
    return heads[head]


__all__ = [
    "BinaryBertConfig",
    "BinaryElectraConfig",
    "BinaryRobertaConfig",
    "CheckpointError",
    "FastDropout",
    "GhostBertConfig",
    "GhostElectraConfig",
    "GhostRobertaConfig",
    "TernaryBertConfig",
    "TernaryElectraConfig",
    "TernaryRobertaConfig",
    "checkpoint_report",
    "export_onnx",
    "format_report",
    "get_model_class",
    "ghost_parameters",
    "multiply_adds",
    "onnx_operators",
    "quantize_bwn",
    "quantize_twn",
    "verify_checkpoint",
    "write_remote_code",
    *modeling_binary.__all__,
    *modeling_ghost.__all__,
    *modeling_ternary.__all__,
]
