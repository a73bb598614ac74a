"""Data: what is loaded is what the file holds, under one set of names; everything else is a named error."""

import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import BertConfig, BertTokenizer, RobertaConfig

from trainers.data import (
    READERS,
    data_identity,
    eval_splits,
    label_config,
    load_data,
    task_of,
    tokenize,
)
from trainers.recipe import DataSpec
from trainers.tasks import GLUE, TASKS, get_task


EXAMPLE = Path(__file__).parents[2] / "examples" / "data" / "rotten_tomatoes"

SENTENCES = ["a fine film", "dull , long", "NA", 'quotes " and , commas', "ünïcode", ""]
LABELS = [1, 0, 1, 0, 1, 1]


def write(path: Path, columns: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = Dataset.from_dict(columns)
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".csv":
        dataset.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        dataset.to_json(path)
    else:
        path.write_text(json.dumps(dataset.to_list()), encoding="utf-8")
    return path


def folder(tmp_path: Path, train: dict, validation: dict | None = None, suffix: str = "parquet") -> Path:
    write(tmp_path / f"train.{suffix}", train)
    write(tmp_path / f"validation.{suffix}", validation or train)
    return tmp_path


def sst2(sentences=SENTENCES, labels=LABELS) -> dict:
    return {"sentence": list(sentences), "label": list(labels), "idx": list(range(len(labels)))}


def rows(task) -> dict:
    """Four rows with the columns of `task`."""
    if task.kind == "question-answering":
        answers = [{"text": [text], "answer_start": [0]} for text in "wxyz"]
        return {"id": list("0123"), "context": list("wxyz"), "question": list("abcd"), "answers": answers}
    text = {task.text: ["a", "b", "c", "d"]} | ({task.text_pair: ["w", "x", "y", "z"]} if task.text_pair else {})
    return text | {
        "label": [0.0, 5.0, 2.5, 1.25] if task.label_names is None else [0, 1, 1, len(task.label_names) - 1]
    }


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test here may ask the Hub."""
    read = datasets.load_dataset

    def refuse(path, *args, **kwargs):
        assert path in READERS.values(), f"asked the Hub for {path}"
        return read(path, *args, **kwargs)

    monkeypatch.setattr("trainers.data.load_dataset", refuse)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_loads_with_normalised_columns(tmp_path, name):
    task = TASKS[name]
    for split in ("train", *task.eval_splits):
        write(tmp_path / name / f"{split}.parquet", rows(task))
    data = load_data(DataSpec(task=name, path=str(tmp_path)))
    assert isinstance(data, DatasetDict) and list(data) == ["train", *task.eval_splits]
    assert task_of(DataSpec(task=name), data) is task
    if task.kind == "question-answering":
        assert data["train"].to_dict() == rows(task)
        return
    assert data["train"].column_names == ["text"] + ["text_pair"] * (task.text_pair is not None) + ["label"]
    assert data["train"]["text"][:] == ["a", "b", "c", "d"]
    if task.text_pair:
        assert data["train"]["text_pair"][:] == ["w", "x", "y", "z"]
    assert data["train"]["label"][:] == rows(task)["label"]


@pytest.mark.parametrize("name", TASKS)
def test_label_config_follows_the_task(tmp_path, name):
    task = TASKS[name]
    config = label_config(load_data(DataSpec(task=name, path=str(folder(tmp_path, rows(task)))), ["train"]))
    if task.kind == "question-answering":
        assert config == {}
    elif task.label_names is None:
        assert config["num_labels"] == 1 and config["problem_type"] == "regression"
    else:
        assert config["problem_type"] == "single_label_classification"
        assert tuple(config["id2label"].values()) == task.label_names
        assert [config["label2id"][name] for name in task.label_names] == list(range(config["num_labels"]))
    BertConfig(**config)


def test_mnli_is_evaluated_on_both_of_its_splits_unless_one_is_named():
    assert eval_splits(DataSpec(task="mnli")) == ("validation_matched", "validation_mismatched")
    assert eval_splits(DataSpec(task="mnli", eval_split="validation_mismatched")) == ("validation_mismatched",)
    assert eval_splits(DataSpec(task="sst2")) == eval_splits(DataSpec(text="a", label="b")) == ("validation",)


def test_glue_is_complete():
    assert {name for name, task in TASKS.items() if task.dataset == GLUE} == set(
        "cola mnli mrpc qnli qqp rte sst2 stsb stsb_embedding wnli".split()
    )
    assert all(task.main_metric in task.metrics for task in TASKS.values())


@pytest.mark.parametrize("suffix", READERS)
def test_formats_give_the_same_rows_and_identity(tmp_path, suffix):
    reference = load_data(DataSpec(task="sst2", path=str(folder(tmp_path / "a", sst2()))))
    data = load_data(DataSpec(task="sst2", path=str(folder(tmp_path / "b" / "sst2", sst2(), suffix=suffix).parent)))
    assert data["train"].to_dict() == {"text": SENTENCES, "label": LABELS}
    assert data_identity(data["train"]) == data_identity(reference["train"])


def test_a_relative_path_starts_at_the_working_folder(tmp_path, monkeypatch):
    folder(tmp_path / "here", sst2())
    monkeypatch.chdir(tmp_path)
    assert len(load_data(DataSpec(task="sst2", path="here"))["train"]) == len(SENTENCES)


def test_one_file_is_one_split(tmp_path):
    path = write(tmp_path / "mine.csv", sst2())
    spec = DataSpec(task="sst2", path=str(path))
    assert list(load_data(spec, splits=["validation"])) == ["validation"]
    with pytest.raises(ValueError, match="data.path: expected a folder with one file per split .*mine.csv"):
        load_data(spec)


def test_identity_is_about_content_only(tmp_path):
    def identity(columns, where):
        return data_identity(load_data(DataSpec(task="sst2", path=str(folder(tmp_path / where, columns))))["train"])

    base = identity(sst2(), "base")
    assert base["rows"] == 6 and len(base["sha256"]) == 64
    assert identity(sst2() | {"idx": [9] * 6}, "unused_column") == base
    assert identity(sst2(labels=[0, *LABELS[1:]]), "label") != base
    assert identity(sst2(["a fine film ", *SENTENCES[1:]]), "space") != base
    assert identity(sst2(SENTENCES[::-1], LABELS[::-1]), "order") != base
    # joined texts of two columns must not be confused with other splits of the same characters
    mrpc = [{"sentence1": [a, "x"], "sentence2": [b, "y"], "label": [0, 1]} for a, b in (("ab", "c"), ("a", "bc"))]
    pairs = [folder(tmp_path / f"pair{i}", columns) for i, columns in enumerate(mrpc)]
    first, second = (data_identity(load_data(DataSpec(task="mrpc", path=str(path)))["train"]) for path in pairs)
    assert first != second


def test_identity_of_the_shipped_data():
    """A golden value: any machine and any version of the libraries must find the same rows."""
    data = load_data(DataSpec(task="rotten_tomatoes", path=str(EXAMPLE)), splits=["train", "validation", "test"])
    assert {split: data_identity(rows) for split, rows in data.items()} == {
        "train": {"rows": 8530, "sha256": "ef45c640c0d55f5d40f013efd75db14ff1877652651366a1f936b8705abce33d"},
        "validation": {"rows": 1066, "sha256": "4047c9d027123bd7e4afe142bbc643155d78a2b64e1bd396f2547b3eab00393f"},
        "test": {"rows": 1066, "sha256": "8aeee8451861ca06735a1c77d0cb0b5dcda692bb46539131374675ebd7c52f31"},
    }
    assert all(sum(rows["label"]) * 2 == len(rows) for rows in data.values())


def test_no_stale_rows_from_the_cache(tmp_path):
    """Same file name elsewhere, and the same file rewritten with equal size and time stamp."""
    one, two = folder(tmp_path / "one", sst2(["aaa"] * 6)), folder(tmp_path / "two", sst2(["bbb"] * 6))
    read = [load_data(DataSpec(task="sst2", path=str(path)))["train"]["text"][0] for path in (one, two)]
    assert read == ["aaa", "bbb"]
    file = one / "train.parquet"
    stamp = file.stat()
    write(file, sst2(["ccc"] * 6))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.stat().st_size == stamp.st_size
    assert load_data(DataSpec(task="sst2", path=str(one)))["train"]["text"][0] == "ccc"


def test_subsets_are_fixed_mixed_and_in_order(tmp_path):
    columns = sst2([f"{i:03}" for i in range(200)], [0] * 100 + [1] * 100)
    spec = DataSpec(task="sst2", path=str(folder(tmp_path, columns)), max_train_samples=40, max_eval_samples=1000)
    data = load_data(spec)
    assert len(data["train"]) == 40 and len(data["validation"]) == 200
    assert set(data["train"]["label"]) == {0, 1}
    assert data["train"]["text"][:] == sorted(data["train"]["text"])
    assert load_data(spec)["train"]["text"][:] == data["train"]["text"][:]


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        (["pos", "neg", "pos"], [1, 0, 1], ("neg", "pos")),
        ([2, 0, 1], [2, 0, 1], ("0", "1", "2")),
        ([0.5, 1.5, 3.0], [0.5, 1.5, 3.0], None),
    ],
)
def test_own_data_finds_its_labels(tmp_path, labels, expected, names):
    columns = {"review": ["a", "b", "c"], "stars": labels}
    spec = DataSpec(path=str(folder(tmp_path, columns, suffix="jsonl")), text="review", label="stars")
    data = load_data(spec)
    assert data["validation"]["label"][:] == expected
    task = task_of(spec, data)
    assert task.label_names == names and task.kind == ("regression" if names is None else "classification")


def test_own_data_can_be_read_with_a_models_labels(tmp_path):
    path = write(tmp_path / "mine.csv", {"review": ["a", "b"], "mood": ["good", "bad"]})
    spec = DataSpec(path=str(path), text="review", label="mood")
    data = load_data(spec, splits=["validation"], label_names=["good", "so so", "bad"])
    assert data["validation"]["label"][:] == [0, 2]
    with pytest.raises(ValueError, match="an index below 2 or a name of good, so so in column 'mood', found 'bad'"):
        load_data(spec, splits=["validation"], label_names=["good", "so so"])


def test_a_file_that_orders_its_classes_otherwise_is_read_by_name(tmp_path):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    dataset = Dataset.from_dict({"sentence": ["good", "bad"], "label": [0, 1]}, features=features)
    for split in ("train", "validation"):
        dataset.to_parquet(tmp_path / f"{split}.parquet")
    assert load_data(DataSpec(task="sst2", path=str(tmp_path)))["train"]["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"], "label": [1]}, "expected a column 'sentence' for data.text, found text, label"),
        ({"sentence": ["a"], "target": [1]}, "expected a column 'label' for data.label, found sentence, target"),
        (sst2([], []), "with at least one row, found: .* no data"),
        (sst2(["a", "b", "c"], [0, 2, 1]), "expected an index below 2 .* found 2 in row 1 \\(1 such rows\\)"),
        (sst2(["a", "b"], [-1, -1]), "found -1 in row 0 \\(2 such rows; -1 marks the unlabelled test splits"),
        (sst2(["a", "b"], ["positive", "postive"]), "a name of negative, positive .* found 'postive' in row 1"),
        (sst2(["a", "b"], [0.0, 1.0]), "found 0.0 in row 0"),
        (sst2(["a", "b"], [True, False]), "found True in row 0"),
        (sst2(["a", "b"], [1, None]), "a value in every row of column 'label', found none in row 1"),
        (sst2(["a", None, None], [1, 0, 1]), "column 'sentence', found none in row 1 \\(2 such rows\\)"),
        (sst2([7, 8], [1, 0]), "expected text in column 'sentence', found int64"),
    ],
)
def test_bad_rows_are_named_with_file_and_column(tmp_path, columns, message):
    path = write(tmp_path / "train.parquet", columns)
    write(tmp_path / "validation.parquet", sst2())
    with pytest.raises(ValueError, match=message) as error:
        load_data(DataSpec(task="sst2", path=str(tmp_path)))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "high"])
def test_regression_labels_are_finite_numbers(tmp_path, value):
    labels = [str(value), "1.0"] if isinstance(value, str) else [value, 1.0]
    folder(tmp_path, {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": labels})
    with pytest.raises(ValueError, match="expected a finite number in column 'label', found .* in row 0"):
        load_data(DataSpec(task="stsb", path=str(tmp_path)))


@pytest.mark.parametrize("labels", [[0, 0], ["a", "b"], [0, 10**9], [[1], [2]]])
def test_own_labels_must_be_classes(tmp_path, labels):
    path = folder(tmp_path, {"review": ["x", "y"], "stars": labels})
    spec = DataSpec(path=str(path), text="review", label="stars")
    if labels == ["a", "b"]:
        assert load_data(spec)["train"]["label"][:] == [0, 1]
    else:
        with pytest.raises(ValueError, match="train.parquet: expected .* in column 'stars', found"):
            load_data(spec)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.parquet", b"PAR1 this is no parquet file PAR1"),
        ("train.parquet", b""),
        ("train.csv", b""),
        ("train.csv", b"\xff\xfe\x00\x81\x82\n\xff"),
        ("train.json", b'[{"sentence": "a", "label": '),
        ("train.jsonl", b"not json\n"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    write(tmp_path / "validation.parquet", sst2())
    with pytest.raises(ValueError, match=name):
        load_data(DataSpec(task="sst2", path=str(tmp_path)))


def test_a_truncated_parquet_file_is_named(tmp_path):
    path = folder(tmp_path, sst2()) / "train.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="train.parquet: expected a readable parquet file"):
        load_data(DataSpec(task="sst2", path=str(tmp_path)))


def test_wrong_paths_and_splits_are_named(tmp_path):
    spec = {"task": "sst2", "path": str(tmp_path)}
    with pytest.raises(
        ValueError, match=r"expected exactly one train.\{parquet,csv,json,jsonl\} .* found nothing there"
    ):
        load_data(DataSpec(**spec))
    folder(tmp_path, sst2())
    with pytest.raises(ValueError, match="for split 'test' in .* found .*train.parquet, .*validation.parquet"):
        load_data(DataSpec(**spec, eval_split="test"))
    write(tmp_path / "train.csv", sst2())
    with pytest.raises(ValueError, match="expected exactly one train.* found .*train.parquet, .*train.csv"):
        load_data(DataSpec(**spec))
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(
        ValueError, match="train.txt: expected a file ending in parquet, csv, json, jsonl, found 'txt'"
    ):
        load_data(DataSpec(task="sst2", path=str(tmp_path / "train.txt")), splits=["train"])
    for wrong in ("no/where/at/all", "./nowhere", str(tmp_path / "nowhere"), "nowhere.parquet", "a b"):
        with pytest.raises(ValueError, match="data.path: expected an existing file or folder, found none at"):
            load_data(DataSpec(task="sst2", path=wrong))


def test_tasks_that_do_not_exist_or_do_not_fit():
    with pytest.raises(ValueError, match="data.task: expected one of cola, .*, found 'sst-2'"):
        get_task("sst-2")
    with pytest.raises(ValueError, match="data.path: expected the Hub data set cornell-movie-review-data"):
        load_data(DataSpec(task="rotten_tomatoes"))
    with pytest.raises(ValueError, match="expected a different column for each of text, label, found"):
        load_data(DataSpec(task="sst2", label="sentence"))


def test_hub_data_sets_are_asked_for_by_name_and_split(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return Dataset.from_dict(sst2())

    monkeypatch.setattr("trainers.data.load_dataset", load_dataset)
    load_data(DataSpec(task="sst2"))
    load_data(DataSpec(task="sst2", path="some/copy", name="v2"), splits=["test"])
    load_data(DataSpec(task="sst2", path="some/copy"), splits=["test"])
    assert asked == [
        ("nyu-mll/glue", "sst2", "train"),
        ("nyu-mll/glue", "sst2", "validation"),
        ("some/copy", "v2", "test"),
        ("some/copy", None, "test"),
    ]


@pytest.mark.parametrize(
    "error",
    [ConnectionError("no network"), ValueError("Unknown split"), datasets.exceptions.DatasetNotFoundError("x")],
)
def test_hub_failures_name_what_was_asked_for(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr("trainers.data.load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"data.path: .* found nothing loadable as nyu-mll/glue .*sst2, split train"):
        load_data(DataSpec(task="sst2"))


@pytest.fixture
def tokenizer(tmp_path):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=16)


def loaded(columns: dict, names=("no", "yes")) -> Dataset:
    texts = {key: value for key, value in columns.items() if key != "label"}
    feature = ClassLabel(names=list(names)) if names else Value("float32")
    return Dataset.from_dict(texts).add_column("label", columns["label"], feature=feature)


def test_tokenize_keeps_inputs_and_labels_only(tokenizer):
    data = DatasetDict(train=loaded({"text": ["a b", "c"], "label": [1, 0]}))
    encoded = tokenize(data, tokenizer, DataSpec(task="sst2", max_length=8))["train"]
    assert set(encoded.column_names) == {*tokenizer.model_input_names, "labels"}
    assert encoded["input_ids"][:] == [[2, 5, 6, 3], [2, 7, 3]]
    assert encoded["labels"][:] == [1, 0]
    assert encoded.cache_files == []


def test_tokenize_pairs_and_cuts_the_longer_sentence(tokenizer):
    data = loaded({"text": ["a a a a a a a a", "a"], "text_pair": ["b b", "b"], "label": [2.5, 0.25]}, names=None)
    encoded = tokenize(data, tokenizer, DataSpec(task="stsb", max_length=9))
    assert encoded["input_ids"][0] == [2, 5, 5, 5, 5, 3, 6, 6, 3]
    assert encoded["token_type_ids"][0] == [0] * 6 + [1] * 3
    assert encoded["labels"][:] == [2.5, 0.25]


def test_tokenize_ignores_truncation_and_padding_stored_with_the_tokenizer(tokenizer):
    """Sentence-embedding checkpoints ship tokenizers that pad and cut to their own length."""
    tokenizer.backend_tokenizer.enable_padding(length=12)
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    encoded = tokenize(loaded({"text": ["a b c d e"], "label": [1]}), tokenizer, DataSpec(task="sst2", max_length=8))
    assert encoded["input_ids"][0] == [2, 5, 6, 7, 8, 9, 3]


def test_tokenize_checks_the_length_limits(tokenizer):
    data = loaded({"text": ["a"], "label": [1]})
    bert = BertConfig(max_position_embeddings=12)
    roberta = RobertaConfig(max_position_embeddings=12, pad_token_id=1)
    assert len(tokenize(data, tokenizer, DataSpec(task="sst2", max_length=12), bert)) == 1
    assert len(tokenize(data, tokenizer, DataSpec(task="sst2", max_length=10), roberta)) == 1
    for length, config, message in [
        (17, None, "expected at most 16, the tokenizer's limit, found 17"),
        (13, bert, "expected at most 12, the model's limit, found 13"),
        (11, roberta, "expected at most 10, the model's limit, found 11"),
        (2, bert, "expected more than the tokenizer's 2 special tokens, found 2"),
    ]:
        with pytest.raises(ValueError, match=f"data.max_length: {message}"):
            tokenize(data, tokenizer, DataSpec(task="sst2", max_length=length), config)
