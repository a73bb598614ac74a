"""Data: loading from the Hub or local files, identity of rows, tokenization.

Every loaded split has the columns `text`, `text_pair` (tasks on two sentences) and `label` (a `ClassLabel`, or float32
for regression), whatever the source calls them; question answering has `id`, `context`, `question` and `answers`
(`text` and `answer_start`, lists of equal length, empty where there is no answer). Bad data is a `ValueError` that
names the file or data set and the field.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .recipe import DataSpec
from .tasks import CORRELATIONS, GLUE, Task, get_task


READERS = {"parquet": "parquet", "csv": "csv", "json": "json", "jsonl": "json"}  # file suffix -> `datasets` builder
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ANSWER_COLUMNS = {  # of question answering: those of the Hub's rajpurkar/squad
    **{name: Value("string") for name in ("id", "context", "question")},
    "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
}
AUGMENTATION = "augmentation.json"  # what `trainers.augmentation` was asked for, in the folder of its shards
SUBSET_SEED = 0  # max_*_samples must pick the same rows in every run, whatever the run's seed


def eval_splits(spec: DataSpec) -> tuple[str, ...]:
    """The splits a run is evaluated on; it is judged by the first."""
    if spec.task is not None and spec.eval_split == "validation":
        return get_task(spec.task).eval_splits
    return (spec.eval_split,)


def task_of(spec: DataSpec, dataset: Dataset | DatasetDict) -> Task:
    """The task of `spec`; for own data one made from the loaded labels (accuracy and F1, or correlations)."""
    if spec.task is not None:
        return get_task(spec.task)
    names = _label_names(dataset)
    if names is None:
        return Task(text=spec.text, metrics=CORRELATIONS, main_metric="pearson_spearman", dataset=None)
    return Task(text=spec.text, label_names=names, metrics=("accuracy", "f1"), dataset=None)


def label_config(dataset: Dataset | DatasetDict) -> dict[str, Any]:
    """`num_labels`, `id2label`, `label2id` and `problem_type` of a loaded data set's labels, for a model's config;
    nothing for question answering."""
    if "answers" in _first(dataset).column_names:
        return {}
    names = _label_names(dataset)
    problem_type = "regression" if names is None else "single_label_classification"
    names = names or ("LABEL_0",)
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": problem_type,
    }


def check_label_order(config: PreTrainedConfig, task: Task, source: str | None = None) -> None:
    """Raises `ValueError` where a checkpoint has the classes of `task` in another order: answers would be taken for
    others. Names of another kind, such as LABEL_0, say nothing."""

    def plain(names: Sequence[str]) -> list[str]:
        return [re.sub(r"[\W_]", "", str(name).lower()) for name in names]

    found = [config.id2label[index] for index in sorted(config.id2label)]
    expected = list(task.label_names or ())
    if sorted(plain(found)) == sorted(plain(expected)) and plain(found) != plain(expected):
        raise ValueError(
            f"{source or config.name_or_path}: expected the classes {expected} in this order, found {found}"
        )


def load_data(
    spec: DataSpec, splits: Sequence[str] | None = None, label_names: Sequence[str] | None = None
) -> DatasetDict:
    """Loads and checks the splits, with the columns of the module's docstring.

    Args:
        spec: `path` is a local folder with `<split>.<suffix>` or `<task>/<split>.<suffix>` (parquet, csv, json,
            jsonl), one local file holding the one split asked for, or a Hub data set.
        splits: names of the splits, by default train and evaluation splits of `spec`.
        label_names: classes in index order, none for regression; by default those of the task. Own data has those of
            its first split: the names of a `ClassLabel`, the sorted strings, 0 up to the highest integer; floats mean
            regression.

    Raises:
        ValueError: path, split, file, column, label or text is wrong; names where, what was expected, what was found.
    """
    splits = list(splits or (spec.train_split, *eval_splits(spec)))
    task = None if spec.task is None else get_task(spec.task)
    columns = source_columns(spec)
    raw = {split: _read(spec, task, split, one_file_ok=len(splits) == 1) for split in splits}
    for source, dataset in raw.values():
        _check_columns(dataset, columns, source)
    if label_names is None and (task is None or task.label_names is not None):
        source, dataset = raw[splits[0]]
        label_names = task.label_names if task else _infer_label_names(dataset, columns["label"], source)
    label_names = label_names or None

    loaded = DatasetDict()
    for split, (source, dataset) in raw.items():
        limit = spec.max_train_samples if split == spec.train_split else None
        limit = spec.max_eval_samples if split in eval_splits(spec) else limit
        loaded[split] = _subset(_normalised(dataset, columns, label_names, task, source), limit)
    return loaded


def load_augmented(spec: DataSpec, train: Dataset) -> Dataset:
    """The rows of `spec.augmented`, with the columns and label names of the loaded training split `train`.

    Raises:
        ValueError: besides what `load_data` refuses: the augmentation is unfinished, or of other rows than `train`.
    """
    root = Path(spec.augmented).expanduser()
    folder = next((path for path in (root, root / (spec.task or ".")) if (path / AUGMENTATION).is_file()), None)
    if folder is None and not root.is_file():
        raise ValueError(f"data.augmented: expected a file or a folder that qbert augment wrote, found none at {root}")
    files = [root]
    if folder is not None:
        made = json.loads((folder / AUGMENTATION).read_text())
        if made["rows"] != data_identity(train):
            raise ValueError(f"{folder}: expected rows made of this training split, found those of {made['rows']}")
        files = [folder / shard_name(index) for index in range(made["shards"])]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise ValueError(f"{folder}: expected {len(files)} shards, missing {len(missing)}; run qbert augment")
    columns, parts = source_columns(spec), []
    for path in files:
        part = _read_file(path)
        _check_columns(part, columns, str(path))
        parts.append(_normalised(part, columns, _label_names(train), task_of(spec, train), str(path)))
    return concatenate_datasets(parts)


def shard_name(index: int) -> str:
    return f"rows-{index:05d}.parquet"


def source_columns(spec: DataSpec) -> dict[str, str]:
    """Normalised column -> the source's name of it."""
    task = None if spec.task is None else get_task(spec.task)
    if task is not None and task.kind == "question-answering":
        return {name: name for name in ANSWER_COLUMNS}
    columns = {
        "text": spec.text or (task and task.text),
        "text_pair": spec.text_pair or (task and task.text_pair),
        "label": spec.label or (task and task.label),
    }
    columns = {key: column for key, column in columns.items() if column is not None}
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"data: expected a different column for each of {', '.join(columns)}, found {columns}")
    return columns


def _normalised(
    dataset: Dataset, columns: dict[str, str], label_names: Sequence[str] | None, task: Task | None, source: str
) -> Dataset:
    """The checked columns of one split under their own names, labels as indices or floats."""
    texts = {key: dataset[column][:] for key, column in columns.items() if key != "label"}
    if "answers" in columns:
        _check_answers(texts, task, source)
        return Dataset.from_dict(texts, features=Features(ANSWER_COLUMNS))
    labels = _labels(dataset, columns["label"], label_names, source)
    feature = Value("float32") if label_names is None else ClassLabel(names=list(label_names))
    return Dataset.from_dict(texts).add_column("label", labels, feature=feature)


def _check_answers(columns: dict[str, list], task: Task, source: str) -> None:
    for row, (context, answers) in enumerate(zip(columns["context"], columns["answers"], strict=True)):
        texts, starts = answers["text"], answers["answer_start"]
        if len(texts) != len(starts) or not (texts or task.unanswerable):
            raise ValueError(
                f"{source}: expected {'as' if task.unanswerable else 'an answer, and as'} many texts as starts in "
                f"column 'answers', found {len(texts)} and {len(starts)} in row {row}"
            )
        for text, start in zip(texts, starts, strict=True):
            if not text or context[start : start + len(text)] != text or start < 0:
                raise ValueError(
                    f"{source}: expected answers that stand in the context, found {text!r} at {start} in row {row}"
                )


def data_identity(dataset: Dataset) -> dict[str, Any]:
    """`rows` and `sha256` of a loaded split: a digest of columns, label names and every row in order, independent of
    machine, file format and file name."""
    header = {"columns": dataset.column_names, "labels": _label_names(dataset)}
    digest = hashlib.sha256(json.dumps(header).encode())
    for batch in dataset.with_format(None).iter(batch_size=1000):
        for row in zip(*batch.values(), strict=True):
            digest.update(b"\n" + json.dumps(row).encode())
    return {"rows": len(dataset), "sha256": digest.hexdigest()}


def tokenize(
    dataset: Dataset | DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    spec: DataSpec,
    config: PreTrainedConfig | None = None,
) -> Dataset | DatasetDict:
    """Loaded splits to model inputs: the tokenizer's inputs (T <= `spec.max_length` each, unpadded) and `labels`.

    Sentence pairs are shortened at the longer one first, as BERT's own code does. The model's `config` adds its number
    of positions to the checks.

    Raises:
        ValueError: `spec.max_length` is above what tokenizer or model can take, or leaves no room for text.
    """
    first = _first(dataset)
    columns = [column for column in ("text", "text_pair") if column in first.column_names]
    check_length(tokenizer, spec, config, tokenizer.num_special_tokens_to_add(pair=len(columns) == 2))

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = [batch[column] for column in columns]
        encoded = tokenizer(*texts, truncation="longest_first", max_length=spec.max_length, padding=False)
        inputs = {key: encoded[key] for key in tokenizer.model_input_names if key in encoded}
        return inputs | {"labels": batch["label"]}

    # In memory: a cache file on disk would have to be trusted in the next run.
    return dataset.map(encode, batched=True, remove_columns=first.column_names, keep_in_memory=True, desc="tokenize")


def check_length(
    tokenizer: PreTrainedTokenizerBase, spec: DataSpec, config: PreTrainedConfig | None, special: int
) -> None:
    """`spec.max_length` is one that tokenizer and model can take, and leaves room beside `special` tokens.

    Raises:
        ValueError: it is not.
    """
    limits = {"tokenizer": tokenizer.model_max_length}
    if config is not None:
        # RoBERTa numbers positions from pad_token_id + 1 on, so that many rows of its table are never reached.
        offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
        limits["model"] = config.max_position_embeddings - offset
    for owner, limit in limits.items():
        if spec.max_length > limit:
            raise ValueError(
                f"data.max_length: expected at most {limit}, the {owner}'s limit, found {spec.max_length}"
            )
    if spec.max_length <= special:
        raise ValueError(
            f"data.max_length: expected more than the tokenizer's {special} special tokens, found {spec.max_length}"
        )


def _read(spec: DataSpec, task: Task | None, split: str, one_file_ok: bool) -> tuple[str, Dataset]:
    """One split as its source stores it, and what to call the source in messages."""
    path = Path(spec.path).expanduser()
    if path.exists():
        if path.is_file() and not one_file_ok:
            raise ValueError(
                f"data.path: expected a folder with one file per split ({spec.train_split}, {spec.eval_split}), "
                f"found the single file {path}"
            )
        source = str(path if path.is_file() else _find_file(path, (spec.task, task and task.name), split))
        dataset = _read_file(Path(source))
    else:
        if not HUB_ID.fullmatch(spec.path) or path.suffix.removeprefix(".") in READERS:
            raise ValueError(f"data.path: expected an existing file or folder, found none at {path.absolute()}")
        if task is not None and spec.path == GLUE and task.dataset != GLUE:
            raise ValueError(
                f"data.path: expected the Hub data set {task.dataset} or a local folder for task {spec.task!r}, "
                f"found {GLUE}"
            )
        own_hub = task is not None and spec.path == task.dataset
        name = spec.name or (task.name if own_hub else None)
        source = f"{spec.path} (configuration {name}, split {split})"
        try:
            dataset = load_dataset(spec.path, name, split=split)
        except (DatasetsError, OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(
                f"data.path: expected a local file or folder (none at {path.absolute()}) or a Hub data set, "
                f"found nothing loadable as {source}: {error}"
            ) from error
    if len(dataset) == 0:
        raise ValueError(f"{source}: expected at least one row in split {split!r}, found an empty data set")
    return source, dataset


def _find_file(folder: Path, names: Sequence[str | None], split: str) -> Path:
    folders = [folder, *(folder / name for name in dict.fromkeys(names) if name)]
    candidates = [parent / f"{split}.{suffix}" for parent in folders for suffix in READERS]
    found = [candidate for candidate in candidates if candidate.is_file()]
    if len(found) == 1:
        return found[0]
    here = found or sorted(item for parent in folders if parent.is_dir() for item in parent.iterdir())
    raise ValueError(
        f"data.path: expected exactly one {split}.{{{','.join(READERS)}}} for split {split!r} in "
        f"{' or '.join(map(str, folders))}, found {', '.join(map(str, here)) or 'nothing there'}"
    )


def _read_file(path: Path) -> Dataset:
    """A local file through its `datasets` builder, kept in memory.

    The builder's cache is a throw-away folder: the shared one is keyed by path and time stamp, and would return stale
    rows for a file replaced under the same stamp.
    """
    suffix = path.suffix.removeprefix(".")
    if suffix not in READERS:
        raise ValueError(f"{path}: expected a file ending in {', '.join(READERS)}, found {suffix!r}")
    # csv: the texts "NA", "null" and "" are texts, not missing values. parquet: the default batch is the first row
    # group, and an empty file has one of size 0, which the reader refuses.
    options = {"csv": {"keep_default_na": False}, "parquet": {"batch_size": 1000}}.get(suffix, {})
    with tempfile.TemporaryDirectory() as cache:
        try:
            return load_dataset(
                READERS[suffix], data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True, **options
            )
        except (DatasetsError, OSError, ValueError, pa.ArrowException) as error:
            reason = error.__cause__ or error
            raise ValueError(
                f"{path}: expected a readable {suffix} file with at least one row, found: {reason}"
            ) from error


def _check_columns(dataset: Dataset, columns: dict[str, str], source: str) -> None:
    for key, column in columns.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"{source}: expected a column {column!r} for data.{key}, found {', '.join(dataset.column_names)}"
            )
        values = dataset.data.column(column)
        if key == "answers" and not _are_answers(dataset.features[column]):
            raise ValueError(
                f"{source}: expected lists 'text' and 'answer_start' in column {column!r}, found {values.type}"
            )
        is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        if key not in ("label", "answers") and not is_text:
            raise ValueError(f"{source}: expected text in column {column!r}, found {values.type}")
        if values.null_count:
            row = next(i for i, value in enumerate(dataset[column]) if value is None)
            raise ValueError(
                f"{source}: expected a value in every row of column {column!r}, found none in row {row} "
                f"({values.null_count} such rows)"
            )


def _are_answers(feature: Any) -> bool:
    if not isinstance(feature, dict) or not all(
        isinstance(feature.get(name), List) for name in ANSWER_COLUMNS["answers"]
    ):
        return False
    kinds = (("text", ("string",)), ("answer_start", ("int32", "int64")))
    return all(feature[name].feature.dtype in (*dtypes, "null") for name, dtypes in kinds)  # null: all are empty


def _infer_label_names(dataset: Dataset, column: str, source: str) -> tuple[str, ...] | None:
    """Class names of own data; None (regression) for a column of floats."""
    feature, values = dataset.features[column], dataset[column][:]
    if isinstance(feature, ClassLabel):
        names = tuple(feature.names)
    elif all(isinstance(value, float) for value in values):
        return None
    elif all(isinstance(value, str) for value in values):
        names = tuple(sorted(set(values)))
    elif all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        # more classes than rows is refused below: identifiers, not classes
        names = tuple(str(index) for index in range(min(max(values), len(values)) + 1))
    else:
        raise ValueError(f"{source}: expected integers, floats or names in column {column!r}, found {feature}")
    if not 2 <= len(names) <= len(values):
        values = f"{values[:3]} and so on" if len(values) > 3 else values
        raise ValueError(f"{source}: expected labels of 2 classes or more in column {column!r}, found {values}")
    return names


def _labels(dataset: Dataset, column: str, names: Sequence[str] | None, source: str) -> list[int] | list[float]:
    """Labels as class indices, or as floats where `names` is None (regression)."""
    feature, values = dataset.features[column], dataset[column][:]
    if names is None:
        expected = "a finite number"
        labels = [float(value) if _is_number(value) and math.isfinite(value) else None for value in values]
    else:
        expected = f"an index below {len(names)} or a name of {', '.join(names)}"
        index_of = {name: index for index, name in enumerate(names)}
        if isinstance(feature, ClassLabel) and feature.names != list(names):
            # The file orders its classes in its own way: go by their names.
            values = [feature.names[value] if 0 <= value < feature.num_classes else value for value in values]
            names = ()
        labels = [
            value
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names)
            else index_of.get(value)
            if isinstance(value, str)
            else None
            for value in values
        ]
    wrong = [row for row, label in enumerate(labels) if label is None]
    if wrong:
        value = values[wrong[0]]
        hint = "; -1 marks the unlabelled test splits of GLUE" if value == -1 else ""
        raise ValueError(
            f"{source}: expected {expected} in column {column!r}, found {value!r} in row {wrong[0]} "
            f"({len(wrong)} such rows{hint})"
        )
    return labels


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _first(dataset: Dataset | DatasetDict) -> Dataset:
    return next(iter(dataset.values())) if isinstance(dataset, DatasetDict) else dataset


def _label_names(dataset: Dataset | DatasetDict) -> tuple[str, ...] | None:
    feature = _first(dataset).features.get("label")
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def _subset(dataset: Dataset, limit: int | None) -> Dataset:
    """`limit` random rows in their original order: the first rows may all be of one class."""
    if limit is None or limit >= len(dataset):
        return dataset
    rows = np.random.default_rng(SUBSET_SEED).permutation(len(dataset))[:limit]
    return dataset.select(sorted(rows.tolist()))
