"""Small random models of every family, backbone, head and state."""

from pathlib import Path

from tiny import BACKBONE_SIZES, ODD, randomize

import modeling_qbert


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FAMILIES = modeling_qbert._FAMILIES
BACKBONES = [(family, backbone) for family, backbones in FAMILIES.items() for backbone in backbones]
EVERY_HEAD = [(family, backbone, head) for family, backbone in BACKBONES for head in FAMILIES[family][backbone]]


def build(family: str, backbone: str, head: str = "sequence-classification", state: str = "latent", **fields):
    """Model with random weights; `state` is "latent" or "packed"."""
    kind = FAMILIES[family][backbone][head]
    if kind.config_class.bits == "32-32-32":  # nothing to pack by default
        fields = {"bits": "2-2-8"} | fields
    model = randomize(kind(kind.config_class(**{**ODD, **BACKBONE_SIZES.get(backbone, {}), **fields})))
    return model.pack() if state == "packed" else model
