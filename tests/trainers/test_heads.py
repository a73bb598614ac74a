"""Heads: every task has one, and tasks with two evaluation splits carry the scores of both."""

import json
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from modeling_qbert import get_model_class
from trainers.card import build_card
from trainers.heads import HEADS, evaluations, predict, predict_splits, scores
from trainers.recipe import DataSpec
from trainers.run import evaluate_checkpoint
from trainers.tasks import TASKS


WORDS = "a b c d e".split()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A random three-class model whose answers differ between sentences."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=5 + len(WORDS),
        max_position_embeddings=16, initializer_range=1.0, num_labels=3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizer(vocab=vocabulary, model_max_length=16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_head_of_the_zoo(name):
    head = HEADS[TASKS[name].kind]
    assert get_model_class("ternary", "bert", head.name).__name__.endswith(
        head.auto_class.__name__[len("AutoModel") :]
    )


def mnli(seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    texts = [[WORDS[i] for i in torch.randint(5, (4,), generator=generator).tolist()] for _ in range(40)]
    labels = torch.randint(3, (20,), generator=generator).tolist()
    columns = {"text": [" ".join(text) for text in texts[:20]], "text_pair": [" ".join(text) for text in texts[20:]]}
    return Dataset.from_dict(columns).add_column("label", labels, feature=ClassLabel(names=list("xyz")))


def test_mnli_has_the_scores_of_both_splits(checkpoint, tmp_path):
    data = DatasetDict(validation_matched=mnli(0), validation_mismatched=mnli(1))
    model = BertForSequenceClassification.from_pretrained(checkpoint)
    tokenizer = BertTokenizer.from_pretrained(checkpoint)
    spec = DataSpec(task="mnli", path=str(tmp_path), max_length=16)
    task = TASKS["mnli"]
    splits = evaluations(task, data, tokenizer, spec)
    logits = predict_splits(model, tokenizer, HEADS[task.kind], splits)
    metrics = scores(logits, splits)
    expected = {}
    for split, name in (("validation_matched", "accuracy"), ("validation_mismatched", "accuracy_mismatched")):
        right = 0
        for row, label in enumerate(data[split]["label"]):
            inputs = tokenizer(data[split]["text"][row], data[split]["text_pair"][row], return_tensors="pt")
            with torch.no_grad():
                alone = model(**inputs).logits[0]
            assert torch.allclose(alone, torch.from_numpy(logits[split][row]), atol=1e-4)
            right += int(alone.argmax()) == label
        expected[name] = right / 20
    assert metrics == pytest.approx(expected) and len(set(expected.values())) == 2
    # The same through the door of `qbert evaluate`.
    for split, rows in data.items():
        columns = {"premise": rows["text"], "hypothesis": rows["text_pair"], "label": rows["label"]}
        lines = [dict(zip(columns, values)) for values in zip(*columns.values())]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert evaluate_checkpoint(str(checkpoint), spec) == metrics
    # Answers of a checkpoint that has the classes in another order would be taken for others.
    model.config.id2label = dict(enumerate(["CONTRADICTION", "entailment", "neutral"]))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match="expected the classes .'entailment', 'neutral', 'contradiction'. in this order"
    ):
        evaluate_checkpoint(str(checkpoint), spec)


def test_own_data_is_scored_by_the_classes_of_the_checkpoint(checkpoint, tmp_path):
    """The evaluated split lacks one of them, or has whole numbers where a regression was trained on others."""
    tokenizer, texts = BertTokenizer.from_pretrained(checkpoint), mnli(0)["text"]
    model = BertForSequenceClassification.from_pretrained(checkpoint)
    model.config.id2label, model.config.problem_type = dict(enumerate("abc")), "single_label_classification"
    model.save_pretrained(checkpoint)
    with torch.no_grad():
        answers = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    lines = [{"text": text, "label": "cca"[answer]} for text, answer in zip(texts, answers)]  # never b
    assert {line["label"] for line in lines} == {"a", "c"}
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    spec = DataSpec(path=str(tmp_path), text="text", label="label", max_length=16)
    right = sum("abc"[answer] == line["label"] for answer, line in zip(answers, lines))
    assert 0 <= right < len(lines) and evaluate_checkpoint(str(checkpoint), spec)["accuracy"] == right / len(lines)

    config = model.config
    config.num_labels, config.problem_type = 1, "regression"
    BertForSequenceClassification(config).save_pretrained(checkpoint)
    lines = [{"text": text, "label": index} for index, text in enumerate(texts)]
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "pearson" in evaluate_checkpoint(str(checkpoint), spec)


def test_the_order_of_the_rows_is_kept(checkpoint):
    """Batches are sorted by length."""
    model, tokenizer = (
        BertForSequenceClassification.from_pretrained(checkpoint),
        BertTokenizer.from_pretrained(checkpoint),
    )
    texts = ["a b c", "a", "b d e c", "c c"]
    inputs = Dataset.from_list([dict(tokenizer(text)) for text in texts])
    found = predict(model, tokenizer, inputs, batch_size=2)
    with torch.no_grad():
        alone = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    assert torch.allclose(torch.from_numpy(found), torch.stack(alone), atol=1e-4)


def test_the_card_tells_the_splits_apart(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"w")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["TernaryBertForSequenceClassification"]}))
    metrics = {"metrics": {"accuracy": 0.8, "accuracy_mismatched": 0.7}}
    digest = "50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326"  # of b"w"
    results = {
        "schema": 1, "run": "r", "recipe": {}, "fingerprint": "f", "seed": 1, "task": "mnli", "rows": 20,
        "split": "validation_matched", "main_metric": "accuracy", "student": metrics,
        "teacher": {"model": "m", "seed": 1, "bytes": 5, **metrics},
        "packed": {"bytes": 1, "sha256": digest, "max_logit_difference": 0.0, **metrics},
        "data": {name: {"rows": 20, "sha256": "0" * 64} for name in TASKS["mnli"].eval_splits},
        "stages": [{"name": "s", "steps": 1, "seconds": 1.0, "final_losses": {}}],
        "versions": {}, "commit": None, "device": "cpu", "seconds": 1.0,
    }  # fmt: skip
    found = build_card(tmp_path, results).data.eval_results
    assert [(item.dataset_split, item.metric_type, item.metric_value) for item in found] == [
        ("validation_matched", "accuracy", 0.8),
        ("validation_mismatched", "accuracy", 0.7),
    ]
