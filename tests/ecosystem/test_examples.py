"""Each example script, run as a user runs it: a tiny model, local files, a few steps; the packed model answers."""

import importlib.util
import json
import sys

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tiny import randomize
from transformers import AutoConfig, AutoModelForQuestionAnswering, BertConfig, BertModel, BertTokenizer, pipeline
from zoo import ROOT

from trainers.tasks import TASKS


WORDS = "the of a on in Ada Lovelace lived London wrote notes engine who where did what answer film good bad".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small full-precision BERT with a vocabulary of words."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "?", ".", "##s"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    randomize(BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))).save_pretrained(
        folder
    )
    return folder


def run(script, monkeypatch, *arguments):
    path = ROOT / "examples" / f"{script}.py"
    specification = importlib.util.spec_from_file_location(script, path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, script, module)
    specification.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    module.main()
    return module


def common(model, folder, *arguments):
    return (
        *("--model_name_or_path", model, "--output_dir", folder, "--do_train", "--do_eval", "--use_cpu"),
        *("--report_to", "none", "--max_steps", "12", "--learning_rate", "5e-3", "--per_device_train_batch_size", "8"),
        *arguments,
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(folder):
    return json.loads((folder / "eval_results.json").read_text())


CLASSES = [{"sentence": f"the {word} film of Ada", "label": word} for word in ("good", "bad")] * 8


@pytest.mark.parametrize("family", ["ternary", "binary"])
def test_text_classification(model, family, tmp_path, monkeypatch):
    data = write(tmp_path / "data.jsonl", CLASSES)
    # 12 steps learn these two words for one seed in two, 60 for every seed.
    arguments = ("--train_file", data, "--validation_file", data, "--family", family, "--max_steps", "60")
    run("run_glue", monkeypatch, *common(model, tmp_path / "out", *arguments))
    assert metrics(tmp_path / "out")["eval_accuracy"] == 1.0
    classify = pipeline("text-classification", model=str(tmp_path / "out/packed"))
    assert classify.model.is_packed and type(classify.model).__name__.startswith(family.title())
    for row in CLASSES[:2]:
        assert classify(row["sentence"])[0]["label"] == row["label"]


def test_glue_task_and_regression(model, tmp_path, monkeypatch):
    rows = [
        {"sentence1": "a good film", "sentence2": f"a {w} film", "label": v} for w, v in (("good", 5.0), ("bad", 0.5))
    ]
    data = write(tmp_path / "data.jsonl", rows * 8)
    arguments = (
        "--task_name",
        "stsb",
        "--train_file",
        data,
        "--validation_file",
        data,
        "--bits",
        "8-8-8",
        "--max_steps",
        "60",
    )
    run("run_glue", monkeypatch, *common(model, tmp_path / "out", *arguments))
    assert metrics(tmp_path / "out")["eval_pearson"] > 0.9
    assert AutoConfig.from_pretrained(tmp_path / "out/packed").bits == "8-8-8"
    with pytest.raises(ValueError, match="task_name: expected one of"):
        run("run_glue", monkeypatch, *common(model, tmp_path / "no", "--task_name", "sts"))
    with pytest.raises(ValueError, match="give task_name, or train_file"):
        run("run_glue", monkeypatch, *common(model, tmp_path / "no"))


def test_the_task_with_two_validation_splits(model, tmp_path, monkeypatch):
    rows = [{"premise": f"a {w} film", "hypothesis": "a good film", "label": v} for w, v in (("good", 0), ("bad", 2))]
    names = Features(premise=Value("string"), hypothesis=Value("string"), label=ClassLabel(3))
    splits = {name: Dataset.from_list(rows * 8, names) for name in ("train", *TASKS["mnli"].eval_splits)}
    monkeypatch.setattr("datasets.load_dataset", lambda *_: DatasetDict(splits))
    run("run_glue", monkeypatch, *common(model, tmp_path / "out", "--task_name", "mnli", "--max_steps", "1"))
    assert "eval_accuracy" in metrics(tmp_path / "out")
    with pytest.raises(ValueError, match="task_name: expected one of"):
        run("run_glue", monkeypatch, *common(model, tmp_path / "no", "--task_name", "squad"))


def test_token_classification(model, tmp_path, monkeypatch):
    rows = [
        {"tokens": "Ada Lovelace lived in London .".split(), "ner_tags": ["B-PER", "I-PER", "O", "O", "B-LOC", "O"]},
        {"tokens": "in London Ada wrote notes".split(), "ner_tags": ["O", "B-LOC", "B-PER", "O", "O"]},
    ]
    data = write(tmp_path / "data.jsonl", rows * 8)
    arguments = ("--train_file", data, "--validation_file", data, "--max_steps", "60")
    module = run("run_ner", monkeypatch, *common(model, tmp_path / "out", *arguments))
    assert metrics(tmp_path / "out")["eval_f1"] > 0.9
    tag = pipeline("ner", model=str(tmp_path / "out/packed"))
    assert {row["word"]: row["entity"] for row in tag("in London Ada wrote notes")} == {
        "London": "B-LOC",
        "Ada": "B-PER",
    }
    tags = ["B-PER", "I-PER", "B-PER", "O", "I-LOC", "I-PER", "O"]
    assert module.entities(tags) == {(0, 2, "PER"), (2, 3, "PER"), (4, 5, "LOC"), (5, 6, "PER")}


def test_question_answering(model, tmp_path, monkeypatch):
    context = "Ada Lovelace wrote notes on the engine . Ada lived in London . "
    rows = [
        {"id": "0", "question": "where did Ada lived ?", "context": context, "answers": ("London", 54)},
        {"id": "1", "question": "who wrote notes ?", "context": context, "answers": ("Ada Lovelace", 0)},
        {"id": "2", "question": "what film ?", "context": context, "answers": None},
    ]
    for row in rows:
        text, start = row["answers"] or (None, None)
        assert text is None or context[start : start + len(text)] == text
        row["answers"] = {"text": [text] if text else [], "answer_start": [start] if text else []}
    data = write(tmp_path / "data.jsonl", rows * 8)
    arguments = ("--train_file", data, "--validation_file", data, "--max_seq_length", "18", "--doc_stride", "4")
    options = ("--max_query_length", "6", "--version_2_with_negative", "--max_steps", "60")
    run("run_qa", monkeypatch, *common(model, tmp_path / "out", *arguments, *options))
    assert metrics(tmp_path / "out")["eval_f1"] > 60
    assert AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out/packed").is_packed


def test_a_latent_checkpoint_trains_on(model, tmp_path, monkeypatch):
    """What a script saved is what the next one starts from."""
    data = write(tmp_path / "data.jsonl", CLASSES)
    arguments = ("--train_file", data, "--validation_file", data)
    run("run_glue", monkeypatch, *common(model, tmp_path / "one", *arguments, "--max_steps", "1"))
    run("run_glue", monkeypatch, *common(tmp_path / "one", tmp_path / "two", *arguments))
    assert metrics(tmp_path / "two")["eval_accuracy"] == 1.0
    with pytest.raises(ValueError, match="attach trainable adapters"):
        run("run_glue", monkeypatch, *common(tmp_path / "one/packed", tmp_path / "three", *arguments))
