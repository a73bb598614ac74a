"""Recipe: everything a run depends on, as frozen dataclasses read from YAML.

An unknown key, a wrong type or a value outside its choices is a `ValueError` that names the file, the field, what
was expected and what was found. Overrides are dotted: `data.task=mrpc`, `stages.0.training.learning_rate=1e-4`; a
field of a stage without `stages.N` (`quantization.bits=2-2-8`, `targets.logits=0`) applies to every stage.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from .typed import UniqueKeyLoader, assign, build_dataclass, convert, join, require, type_hints, unknown_key


FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Fields of the recipe, of data, a stage or its targets
_GAINED = (
    *("schedule", "total_steps", "doc_stride", "max_query_length", "null_threshold", "augmented", "start"),
    "embeddings",
    "labels",
    "split_multiply_adds",
    "step_learning_rate",
    "without_dropout",
)
RUNNER_FIELDS = ("output_dir", "seed")  # TrainingArguments fields the runner sets itself


@dataclass(frozen=True)
class DataSpec:
    """Which rows to train and evaluate on.

    `task` is a key of `trainers.tasks.TASKS` and gives columns, label names and metrics; without it `text` and `label`
    name the columns of your own data. `path` is a Hub data set, or a local folder or file relative to the working
    folder. `augmented` holds further training rows, for stages that ask for them: a file of the same columns, or what
    `qbert augment` writes, there or in a folder <task>/. Question answering only: `doc_stride` is the step in tokens
    from one window over a long context to the next, `max_query_length` the most tokens of a question, `null_threshold`
    by how much "no answer" must beat the best answer to be given; without them BERT's 128, 64 and 0.
    """

    task: str | None = None
    path: str = "nyu-mll/glue"
    name: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    max_length: int = 128
    train_split: str = "train"
    eval_split: str = "validation"
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    augmented: str | None = None
    doc_stride: int | None = None
    max_query_length: int | None = None
    null_threshold: float | None = None

    def __post_init__(self):
        if self.task is None and (self.text is None or self.label is None):
            raise ValueError(
                "task: expected a task name, or the columns of your own data in both `text` and `label`; "
                f"found task=None, text={self.text!r}, label={self.label!r}"
            )
        for key in ("path", "train_split", "eval_split"):
            require(bool(getattr(self, key)), key, "a non-empty string", getattr(self, key))
        for key in ("max_length", "max_train_samples", "max_eval_samples", "doc_stride", "max_query_length"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "a positive number", value)
        require(self.train_split != self.eval_split, "eval_split", "a split other than train_split", self.eval_split)


@dataclass(frozen=True)
class TeacherSpec:
    """The model to imitate: fine-tuned already, or a pre-trained backbone to be fine-tuned with `fine_tune` first.

    `architecture` first puts the weights of a BERT into another one (see `initialization.change_architecture`).
    """

    model: str
    fine_tune: dict[str, Any] | None = None
    seed: int = 42
    architecture: Literal["roberta", "electra"] | None = None

    def __post_init__(self):
        require(bool(self.model), "model", "a Hub id or a local folder", self.model)
        needed = self.architecture is None or self.fine_tune is not None
        require(needed, "fine_tune", "training, its head is new in another architecture", self.fine_tune)
        _check_seed(self.seed)
        if self.fine_tune is not None:
            object.__setattr__(self, "fine_tune", _training_arguments(self.fine_tune, "fine_tune"))


@dataclass(frozen=True)
class QuantizationSpec:
    """The quantization fields of the student's config, same names and defaults.

    `bits` is W-E-A: weights, word embedding, activations. `hidden_act` replaces the teacher's activation function.
    """

    bits: str = "2-2-8"
    weight_quantizer: Literal["twn", "lat"] = "twn"
    weight_granularity: Literal["per_tensor", "per_row", "per_group"] = "per_tensor"
    embedding_granularity: Literal["per_tensor", "per_row", "per_group"] = "per_row"
    group_size: int = 64
    activation_quantizer: Literal["symmetric", "asymmetric", "pact", "lsq"] = "asymmetric"
    activation_granularity: Literal["per_token", "per_tensor"] = "per_token"
    binary_quantizer: Literal["bwn", "centered"] = "bwn"
    planes: Literal[1, 2] = 1
    position_bits: Literal[32, 8] = 32
    hidden_act: str | None = None

    def __post_init__(self):
        require(re.fullmatch(r"\d+-\d+-\d+", self.bits), "bits", "W-E-A such as '2-2-8'", self.bits)
        require(self.group_size > 0, "group_size", "a positive number", self.group_size)

    def fields(self) -> dict[str, Any]:
        """What the student's config gets."""
        return {name: value for name, value in vars(self).items() if (name, value) != ("hidden_act", None)}


@dataclass(frozen=True)
class GhostSpec:
    """The ghost fields of the student's config without `ghost_`, for family "ghost", same defaults.

    `learning_rate` is that of kernels and factors, which have no weight decay; default that of the weights.
    """

    placement: Literal["both", "attention", "feed_forward", "none"] = "both"
    features: int | None = None
    kernel_size: int = 3
    normalization: Literal["softmax", "none"] = "softmax"
    activation: str = "relu"
    learning_rate: float | None = None

    def __post_init__(self):
        rate = self.learning_rate
        require(rate is None or (math.isfinite(rate) and rate > 0), "learning_rate", "a finite number above 0", rate)

    def fields(self) -> dict[str, Any]:
        """What the student's config gets."""
        return {f"ghost_{name}": value for name, value in vars(self).items() if name != "learning_rate"}


@dataclass(frozen=True)
class Targets:
    """Weights of the distillation terms; 0 switches a term off. `embeddings` compares the mean-pooled last hidden
    states by their cosine; `labels` is the task's own loss, which needs no teacher."""

    logits: float = 1.0
    hidden_states: float = 1.0
    attention_scores: float = 1.0
    embeddings: float = 0.0
    labels: float = 0.0

    def __post_init__(self):
        weights = dataclasses.asdict(self)
        for key, value in weights.items():
            require(math.isfinite(value) and value >= 0, key, "a finite weight of at least 0", value)
        if not any(weights.values()):
            raise ValueError(f"{', '.join(weights)}: expected at least one positive weight, found all 0")


@dataclass(frozen=True)
class Stage:
    """One training run: where the student starts, how it is quantized, what it imitates and for how long.

    `init` is where its weights come from: the recipe's `teacher`; the `previous` stage; `pruned`, the previous stage's
    (or the teacher's) network whose heads and neurons are ranked and cut to `width`; `subnetwork`, its leading part of
    that width as it is; `split`, the previous stage's ternary network split into two binary planes; `random_encoder`,
    the recipe's teacher with new random weights in its encoder, or in the `random_parts` instead. `start` names an
    earlier stage to be the previous one. `widths` trains all these widths at once. `teacher` names an earlier stage to
    imitate instead of the recipe's teacher.
    `teacher_dropout` leaves the teacher's dropout on, `without_dropout` turns the student's off.
    `split_megabytes` makes a binary student ternary in the modules that the best (or, as controls, a random or the
    worst) choice of adaptive splitting would split within a file of that size; a later stage splits just these.
    `split_multiply_adds` instead bounds the millions of multiply-adds that this adds to a sentence of 128 tokens.
    `learning_rate_ratio` multiplies the learning rate; `quantizer_learning_rate` is that of learned step sizes and
    clips, `step_learning_rate` instead that of step sizes in units of their first values. `augmented` trains on the
    rows of `data.augmented` instead of the training split. `training` takes any field of
    `transformers.TrainingArguments` but output_dir and seed.
    """

    name: str = "distil"
    init: Literal["teacher", "previous", "pruned", "subnetwork", "split", "random_encoder"] = "teacher"
    start: str | None = None
    random_parts: tuple[
        Literal["embeddings", "labels", "encoder", "lower", "upper", "attention", "feed_forward"], ...
    ] = ()
    width: float | None = None
    widths: tuple[float, ...] = ()
    teacher: str | None = None
    quantization: QuantizationSpec = field(default_factory=QuantizationSpec)
    ghost: GhostSpec = field(default_factory=GhostSpec)
    targets: Targets = field(default_factory=Targets)
    teacher_dropout: bool = False
    without_dropout: bool = False
    temperature: float = 1.0
    split_megabytes: float | None = None
    split_multiply_adds: float | None = None
    split_selection: Literal["gain", "random", "smallest_gain"] = "gain"
    learning_rate_ratio: float = 1.0
    quantizer_learning_rate: float | None = None
    step_learning_rate: float | None = None
    augmented: bool = False
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _check_folder_name(self.name)
        for key in ("learning_rate_ratio", "quantizer_learning_rate", "step_learning_rate"):
            rate = getattr(self, key)
            require(rate is None or (math.isfinite(rate) and rate > 0), key, "a finite number above 0", rate)
        if self.init in ("pruned", "subnetwork"):
            require(self.width is not None, "width", f"a number for init {self.init!r}", self.width)
        else:
            require(self.width is None, "width", "nothing, unless init is 'pruned' or 'subnetwork'", self.width)
        begun = self.init not in ("teacher", "random_encoder")
        require(begun or self.start is None, "start", f"nothing for init {self.init!r}", self.start)
        require(
            not self.random_parts or self.init == "random_encoder",
            "random_parts",
            "nothing, unless init is 'random_encoder'",
            self.random_parts,
        )
        for key, widths in (("width", () if self.width is None else (self.width,)), ("widths", self.widths)):
            require(all(0 < width <= 1 for width in widths), key, "shares in (0, 1]", widths)
        budgets = (self.split_megabytes, self.split_multiply_adds)
        require(None in budgets, "split_multiply_adds", "nothing beside split_megabytes", self.split_multiply_adds)
        for key, budget in zip(("split_megabytes", "split_multiply_adds"), budgets):
            if budget is not None:
                bits, found = self.quantization.bits, (budget, self.quantization.bits)
                require(math.isfinite(budget) and budget > 0, key, "a finite number above 0", budget)
                require(bits.startswith("1-1-"), key, "a stage of binary weights, bits 1-1-A", found)
                require(self.quantization.planes == 1, key, "one plane, before the splitting", found)
        require(math.isfinite(self.temperature) and self.temperature > 0, "temperature", "above 0", self.temperature)
        object.__setattr__(self, "training", _training_arguments(self.training, "training"))

    @property
    def chooses_modules(self) -> bool:
        """Whether adaptive splitting chooses some of the student's modules."""
        return self.split_megabytes is not None or self.split_multiply_adds is not None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Ordered stages from a full-precision checkpoint to a packed one.

    `schedule` names the stages to run, in this order, of which the first starts from the teacher where it says
    `previous`; `last_stage` leaves later ones out. `total_steps` is a budget that the stages share in proportion to
    their `training.num_train_epochs`. All three are resolved at birth: they read as unset, the stages as they run.
    """

    name: str
    family: str = "ternary"
    data: DataSpec
    teacher: TeacherSpec
    stages: tuple[Stage, ...]
    packing: Literal["2bit", "dense"] = "2bit"
    schedule: tuple[str, ...] = ()
    last_stage: str | None = None
    total_steps: int | None = None
    seed: int = 42

    def __post_init__(self):
        _check_folder_name(self.name)
        _check_seed(self.seed)
        require(len(self.stages) > 0, "stages", "at least one stage", "none")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), "stages", "a different name for every stage", names)
        if self.schedule:
            names = self._resolve_schedule(names)
        first = self.stages[0].init
        possible = ("teacher", "pruned", "random_encoder")
        require(first in possible, "stages.0.init", f"one of {possible}, no stage precedes it", first)
        for index, stage in enumerate(self.stages):
            known = [None, *names[:index]]
            for key in ("teacher", "start"):
                name = getattr(stage, key)
                require(name in known, f"stages.{index}.{key}", f"one of {known}", name)
            rows = self.data.augmented
            require(rows or not stage.augmented, f"stages.{index}.augmented", "data.augmented to be given", rows)
            ghostly = self.family == "ghost" or stage.ghost == GhostSpec()
            require(ghostly, f"stages.{index}.ghost", "family 'ghost', or no such field", self.family)
        if self.last_stage is not None:
            require(self.last_stage in names, "last_stage", f"one of {names}", self.last_stage)
            object.__setattr__(self, "stages", self.stages[: names.index(self.last_stage) + 1])
            object.__setattr__(self, "last_stage", None)
        if self.total_steps is not None:
            self._share_steps(self.total_steps)

    def _resolve_schedule(self, names: list[str]) -> list[str]:
        for index, name in enumerate(self.schedule):
            free = [other for other in names if other not in self.schedule[:index]]
            require(name in free, f"schedule.{index}", f"one of {free}", name)
        first, *rest = (self.stages[names.index(name)] for name in self.schedule)
        if first.init == "previous" and first.start is None:
            first = dataclasses.replace(first, init="teacher")
        object.__setattr__(self, "stages", (first, *rest))
        object.__setattr__(self, "schedule", ())
        return [stage.name for stage in self.stages]

    def _share_steps(self, total: int) -> None:
        shares = []
        for index, stage in enumerate(self.stages):
            share, where = stage.training.get("num_train_epochs"), f"stages.{index}.training"
            require(share and share > 0, f"{where}.num_train_epochs", "a share of total_steps", share)
            require("max_steps" not in stage.training, where, "total_steps or max_steps, not both", stage.training)
            shares.append(share)
        ends = [round(total * sum(shares[:count]) / sum(shares)) for count in range(len(shares) + 1)]
        steps = [end - start for start, end in zip(ends, ends[1:], strict=False)]
        require(min(steps) > 0, "total_steps", f"at least a step for each of {len(steps)} stages", total)
        stages = []
        for stage, own in zip(self.stages, steps, strict=True):
            training = {key: value for key, value in stage.training.items() if key != "num_train_epochs"}
            stages.append(dataclasses.replace(stage, training=training | {"max_steps": own}))
        object.__setattr__(self, "stages", tuple(stages))
        object.__setattr__(self, "total_steps", None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Builds and checks a recipe from plain values. Raises `ValueError` naming the field."""
        return build_dataclass(cls, values, "")

    @classmethod
    def from_portable(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that `portable()` values tell of, and that has the same ones: they name no place of data."""
        augmented = any(stage.get("augmented") for stage in values["stages"])
        return cls.from_dict({**values, "data": values["data"] | {"augmented": "elsewhere" if augmented else None}})

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Reads a recipe file and applies dotted `key=value` overrides. Raises `ValueError` naming file and field."""
        try:
            values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
            require(isinstance(values, dict), "top level", "a mapping", type(values).__name__)
            for override in overrides:
                _override(values, override)
            return cls.from_dict(values)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: expected a recipe file, found none there") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: expected a readable YAML recipe, found: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values of every field, in the order of the fields; `from_dict` gives an equal recipe back.

        Fields younger than the first results are left out where they say nothing: old recipes keep their fingerprint.
        """
        values = dataclasses.asdict(self)
        lists = ("widths", "random_parts")
        values["stages"] = [{**stage, **{key: list(stage[key]) for key in lists}} for stage in values["stages"]]
        values["schedule"] = list(values["schedule"])
        if self.teacher.architecture is None:
            del values["teacher"]["architecture"]
        for stage in values["stages"]:
            if self.family != "ghost":
                del stage["ghost"]
        return values

    def to_yaml(self) -> str:
        """The whole recipe as YAML text, defaults included."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def portable(self) -> dict[str, Any]:
        """`to_dict` without what differs between machines: no paths of data, of teacher.model only the last component;
        and without fields that recipes gained after first results, where they are not used: fingerprints stay."""
        values = self.to_dict()
        del values["data"]["path"], values["data"]["augmented"]
        targets = (stage["targets"] for stage in values["stages"])
        for node in (values, values["data"], *values["stages"], *targets):
            for name in _GAINED:
                if not node.get(name, True):
                    del node[name]
        values["teacher"]["model"] = re.split(r"[/\\]", self.teacher.model.rstrip("/\\"))[-1]
        return values

    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of `portable()`: equal recipes have equal fingerprints on every machine."""
        text = json.dumps(self.portable(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _check_folder_name(name: str) -> None:
    require(FOLDER_NAME.fullmatch(name), "name", "a folder name of letters, digits, '.', '_' and '-'", name)


def _check_seed(seed: int) -> None:
    require(0 <= seed < 2**32, "seed", "0 to 2**32 - 1 (numpy's range)", seed)


def _training_arguments(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Checks names and types against the fields of `TrainingArguments`; numbers become the field's type, so that
    `num_train_epochs: 3` and `3.0` are the same recipe."""
    from transformers import TrainingArguments  # imported late: it takes seconds, `qbert --help` must not

    hints = type_hints(TrainingArguments)
    known = [item.name for item in fields(TrainingArguments) if item.init and item.name not in RUNNER_FIELDS]
    checked = {}
    for key, value in values.items():
        where = join(name, str(key))
        if key in RUNNER_FIELDS:
            raise ValueError(f"{where}: the runner sets it; expected the recipe's own `seed` or output folder instead")
        if key not in known:
            raise unknown_key(str(key), known, name)
        checked[key] = convert(value.value if isinstance(value, enum.Enum) else value, hints[key], where)
        for option in typing.get_args(hints[key]):
            if isinstance(option, type) and issubclass(option, enum.Enum):
                choices = [member.value for member in option]
                require(checked[key] in choices, where, f"one of {', '.join(map(repr, choices))}", value)
    return checked


def _override(values: dict[str, Any], override: str) -> None:
    """Sets one dotted `key=value` in place; the value is read as YAML."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    require(equals and all(path), f"override {override!r}", "key=value with a dotted key", override)
    try:
        value = yaml.load(text, Loader=UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: expected a YAML value, found: {error}") from error
    if path[0] in type_hints(Stage) and path[0] not in type_hints(Recipe):
        stages = values.get("stages")
        require(isinstance(stages, list) and stages, f"override {override!r}", "a recipe with stages", stages)
        for index in range(len(stages)):
            assign(values, ["stages", str(index), *path], value, override)
    else:
        assign(values, path, value, override)
