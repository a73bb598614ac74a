"""Metrics: known values, agreement of all doors, and no score for broken predictions."""

import evaluate
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, EvalPrediction

from trainers.metrics import GlueMetric, compute_metrics_for, main_metric, mean_squared_difference, score
from trainers.tasks import TASKS, Task


PREDICTIONS, REFERENCES = [1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0]
# by hand: 2 true positives, 2 true negatives, 1 false positive, 1 false negative
KNOWN = {"accuracy": 4 / 6, "f1": 2 / 3, "matthews_correlation": (2 * 2 - 1) / np.sqrt(3 * 3 * 3 * 3)}
SENTENCES = [name for name, task in TASKS.items() if task.kind != "question-answering"]
BINARY = [name for name, task in TASKS.items() if task.label_names and len(task.label_names) == 2]
THREE = Task(text="text", label_names=("a", "b", "c"), metrics=("accuracy", "f1"), dataset=None)


@pytest.mark.parametrize("name", BINARY)
def test_known_values(name):
    scores = score(name, PREDICTIONS, REFERENCES)
    assert scores == pytest.approx({metric: KNOWN[metric] for metric in TASKS[name].metrics})
    assert list(scores) == list(TASKS[name].metrics) and main_metric(name) in scores


def test_distance_between_logits():
    first, second = np.array([[1, 2], [0, 0]], np.float32), np.array([[3, 2], [0, 0]], np.float32)
    assert mean_squared_difference(first, first) == mean_squared_difference(first[1:], second[1:]) == 0
    assert mean_squared_difference(first, second) == 2  # (2^2 + 0^2) / 2: padding does not count
    assert mean_squared_difference(first, -first) == 10


def test_main_metrics():
    assert main_metric("cola") == "matthews_correlation" and main_metric("stsb") == "pearson_spearman"
    assert main_metric("squad") == main_metric("squad_v2") == "f1"
    assert main_metric("stsb_embedding") == "spearmanr"
    others = set(SENTENCES) - {"cola", "stsb", "stsb_embedding"}
    assert {main_metric(name) for name in others} == {"accuracy"}


def test_macro_f1_counts_a_class_nobody_predicts():
    scores = score(THREE, [0, 0, 1], [0, 2, 1])
    assert scores == pytest.approx({"accuracy": 2 / 3, "f1": (2 / 3 + 1 + 0) / 3})


def test_correlations():
    scores = score("stsb", [1.0, 2.0, 3.0, 10.0], [1.0, 2.0, 3.0, 4.0])
    pearson = np.corrcoef([1, 2, 3, 10], [1, 2, 3, 4])[0, 1]
    assert scores == pytest.approx({"pearson": pearson, "spearmanr": 1.0, "pearson_spearman": (pearson + 1) / 2})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("predictions", [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0 + 1e-15]])
def test_a_constant_regression_scores_zero(predictions):
    scores = score("stsb", predictions, [1.0, 3.0, 2.0])
    assert all(np.isfinite(value) for value in scores.values())
    if len(set(predictions)) == 1:
        assert set(scores.values()) == {0.0}


def test_a_constant_classifier_scores_zero_on_cola():
    assert score("cola", [1, 1, 1], [1, 0, 1])["matthews_correlation"] == 0.0


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        ([], []),
        ([1, 0], [1]),
        ([[1, 0]], [[1, 0]]),
        ([1.0, float("nan")], [1.0, 2.0]),
        ([1.0, 2.0], [float("inf"), 1.0]),
    ],
)
def test_no_score_for_broken_predictions(predictions, references):
    with pytest.raises(ValueError, match="expected"):
        score("stsb", predictions, references)


@pytest.mark.parametrize("name", SENTENCES)
def test_every_door_gives_the_same_scores(name):
    task = TASKS[name]
    rng = np.random.default_rng(0)
    if task.label_names is None:
        logits, references = rng.normal(size=(50, 1)).astype(np.float32), rng.uniform(0, 5, 50).astype(np.float32)
        predictions = logits[:, 0]
    else:
        classes = len(task.label_names)
        logits, references = rng.normal(size=(50, classes)), rng.integers(0, classes, 50)
        predictions = logits.argmax(1)
    expected = score(name, predictions, references)
    metric = GlueMetric(name)
    assert metric.compute(predictions=predictions, references=references) == pytest.approx(expected)
    for start in range(0, 50, 20):
        part = slice(start, start + 20)
        metric.add_batch(predictions=predictions[part], references=references[part])
    assert metric.compute() == pytest.approx(expected)
    compute_metrics = compute_metrics_for(name)
    assert compute_metrics(EvalPrediction(logits, references)) == pytest.approx(expected)
    assert compute_metrics(EvalPrediction((logits, np.zeros((50, 3, 8))), references)) == pytest.approx(expected)


def test_two_metrics_at_once_do_not_share_state():
    first, second = GlueMetric("sst2"), GlueMetric("sst2")
    first.add_batch(predictions=[1, 1], references=[1, 1])
    second.add_batch(predictions=[0, 0], references=[1, 1])
    assert first.compute() == {"accuracy": 1.0} and second.compute() == {"accuracy": 0.0}


@pytest.mark.parametrize(
    ("name", "logits", "message"),
    [
        ("sst2", np.zeros((4, 3)), r"logits: expected shape \(B, 2\), found \(4, 3\)"),
        ("stsb", np.zeros(4), r"logits: expected shape \(B, 1\), found \(4,\)"),
        ("sst2", np.array([[0, 1], [np.nan, 0], [0, 1], [np.inf, 0]]), "found 2 of 4 rows that are not"),
    ],
)
def test_logits_of_the_wrong_shape_or_kind_are_refused(name, logits, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics_for(name)(EvalPrediction(logits, np.zeros(4, dtype=int)))


def test_unknown_tasks_are_refused():
    for door in (main_metric, GlueMetric, compute_metrics_for):
        with pytest.raises(ValueError, match="data.task: expected one of .* found 'sst3'"):
            door("sst3")


@pytest.mark.parametrize("from_folder", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_evaluate_evaluator_takes_the_metric_without_a_network(tmp_path, pair, from_folder):
    (tmp_path / "vocab.txt").write_text("\n".join("[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e".split()))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=16)
    torch.manual_seed(0)
    task = TASKS["mrpc"]
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99,
        max_position_embeddings=16, initializer_range=1.0, id2label=dict(enumerate(task.label_names)),
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    texts = ["a", "b c", "d e a", "c", "e e e", "b", "a d", "d d"]
    columns = {"text": texts} | ({"text_pair": texts[::-1]} if pair else {})
    data = Dataset.from_dict(columns).add_column("label", [0, 1] * 4, feature=ClassLabel(names=list(task.label_names)))

    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = evaluate.evaluator("text-classification").compute(
        str(tmp_path / "model") if from_folder else model,
        tokenizer=None if from_folder else tokenizer,
        data=data,
        metric=GlueMetric("mrpc"),
        second_input_column="text_pair" if pair else None,
        label_mapping={name: index for index, name in enumerate(task.label_names)},
    )
    inputs = [tokenizer(*row, return_tensors="pt") for row in zip(*columns.values(), strict=True)]
    with torch.no_grad():
        expected = [model(**row).logits.argmax().item() for row in inputs]
    assert len(set(expected)) == 2, "a constant model would hide a wrong label mapping"
    scores = score("mrpc", expected, [0, 1] * 4)
    assert {name: result[name] for name in scores} == pytest.approx(scores)
