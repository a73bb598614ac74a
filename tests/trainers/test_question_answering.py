"""Question answering: SQuAD's scores by hand, windows that cover the context, spans, and a recipe from end to end."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from trainers import cli
from trainers.data import load_data
from trainers.question_answering import (
    _best_span,
    answer,
    best_answers,
    model_inputs,
    normalized,
    score,
    windows,
)
from trainers.recipe import DataSpec, Recipe
from trainers.results import read_results
from trainers.run import run_recipe
from trainers.tasks import TASKS


WORDS = "who what when saw built the a in of cat dog man tower bridge 1871 1912 red blue ? .".split()
SPEC = DataSpec(task="squad", path="unused", max_length=16, doc_stride=4, max_query_length=5)


def make_tokenizer(folder: Path, length: int = 16) -> BertTokenizer:
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=length)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def row(question: str, context: str, text: str | None, number: int = 0) -> dict:
    answers = {"text": [], "answer_start": []}
    if text is not None:
        answers = {"text": [text], "answer_start": [context.index(text)]}
    return {"id": str(number), "context": context, "question": question, "answers": answers}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The  Cat, a dog; AN owl!", "cat dog owl"),
        ("theatre", "theatre"),  # an article is a whole word
        ("U.S.A.", "usa"),
        ("a-b", "ab"),  # punctuation goes first, so that the article does not stand alone
        ("“x”", "“x”"),  # ASCII punctuation only
        ("the", ""),
        ("", ""),
    ],
)
def test_normalized_by_hand(text, left):
    assert normalized(text) == left


@pytest.mark.parametrize(
    ("task", "found", "gold", "exact", "f1"),
    [
        ("squad", "the red tower.", ["Red tower"], 1, 1),
        ("squad", "red tower", ["blue tower"], 0, 2 * 0.5 * 0.5 / 1),  # 1 of 2, 1 of 2
        ("squad", "a red red tower", ["red"], 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # 1 of 3, 1 of 1
        ("squad", "1871", ["in 1871", "the year 1871", "1871"], 1, 1),  # the best of all gold answers
        ("squad", "tower", ["red tower", "the old tower bridge"], 0, 2 * 1 * 0.5 / 1.5),
        ("squad", "dog", ["cat"], 0, 0),
        ("squad", "", ["cat"], 0, 0),
        ("squad", "the", ["a"], 1, 0),  # version 1.1 counts no words in common as F1 0
        ("squad_v2", "", [], 1, 1),
        ("squad_v2", "cat", [], 0, 0),
        ("squad_v2", "", ["cat"], 0, 0),
        ("squad_v2", "", ["the"], 1, 1),  # nothing is left of the gold answer: there is none
        ("squad_v2", "the", ["cat"], 0, 0),
        ("squad_v2", "red tower", ["the", "blue tower"], 0, 0.5),
    ],
)
def test_scores_by_hand(task, found, gold, exact, f1):
    assert score(TASKS[task], [found], [gold]) == pytest.approx({"exact_match": exact, "f1": f1})


def test_scores_are_means_over_questions():
    assert score(TASKS["squad_v2"], ["cat", "", "x"], [["cat"], [], []]) == pytest.approx(
        {"exact_match": 2 / 3, "f1": 2 / 3}
    )
    with pytest.raises(ValueError, match="answers: expected one for each of 2 questions, found 1"):
        score(TASKS["squad"], ["x"], [["x"], ["y"]])


def test_windows_cover_the_context_in_steps(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    context = "the man saw the red cat in the blue tower of 1871 . the dog built a bridge"
    rows = Dataset.from_list([row("who built the red bridge in 1912 ?", context, "the dog")])
    cut = windows(rows, tokenizer, dataclasses.replace(SPEC, doc_stride=5))
    words = context.split()
    # 16 tokens: 3 special ones, 5 of the question, 8 of the context, which go on by 5.
    expected = [words[0:8], words[5:13], words[10:]]
    assert set(cut.column_names) >= {"input_ids", "attention_mask", "token_type_ids", "row", "starts", "ends"}
    for window, part in zip(cut, expected, strict=True):
        assert len(window["input_ids"]) <= 16 and window["row"] == 0
        spans = [(start, end) for start, end in zip(window["starts"], window["ends"]) if start >= 0]
        assert [context[start:end] for start, end in spans] == part
        assert (
            window["starts"][:7] == [-1] * 7
            and tokenizer.decode(window["input_ids"][1:6]) == "who built the red bridge"
        )
    # The answer is in the last window only.
    positions = list(zip(cut["start_positions"], cut["end_positions"]))
    assert positions == [(0, 0), (0, 0), (10, 11)]
    assert set(model_inputs(rows, tokenizer, SPEC).column_names) == {
        "input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions",
    }  # fmt: skip


def test_windows_need_room_for_the_question(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    rows = Dataset.from_list([row("who", "a cat", "cat")])
    with pytest.raises(ValueError, match="data.max_length: expected more than the tokenizer's 67"):
        windows(rows, tokenizer, DataSpec(task="squad", max_length=16))


def test_a_cut_answer_is_no_answer(tmp_path):
    """An answer that a window holds in part only is not taught there."""
    tokenizer = make_tokenizer(tmp_path)
    context = "cat dog cat dog cat dog red blue red blue cat"
    cut = windows(Dataset.from_list([row("who", context, "red blue red blue")]), tokenizer, SPEC)
    texts = [
        None if not window["start_positions"] else context[
            window["starts"][window["start_positions"]] : window["ends"][window["end_positions"]]
        ]
        for window in cut
    ]  # fmt: skip
    assert set(texts) == {"red blue red blue"} or set(texts) == {None, "red blue red blue"}


@pytest.mark.parametrize(
    ("starts", "ends", "expected"),
    [
        ([9, 0, 3, 0], [9, 1, 0, 2], (2, 3, 5.0)),  # token 0 is no word of the context
        ([0, 0, 0, 5], [0, 5, 0, 1], (3, 3, 6.0)),  # an end never precedes its start
    ],
)
def test_the_best_span(starts, ends, expected):
    values = np.array([starts, ends], dtype=np.float32).T
    assert _best_span(values, np.array([1, 2, 3])) == expected


def test_answers_have_at_most_thirty_tokens():
    values = np.zeros((50, 2), dtype=np.float32)
    values[5, 0] = values[40, 1] = 10
    values[30, 1] = 1
    assert _best_span(values, np.arange(1, 50)) == (5, 30, 11.0)
    assert _best_span(values, np.array([], dtype=int))[2] == -np.inf


def test_the_best_window_wins_and_nothing_needs_the_threshold(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    context = "the man saw the red cat in the blue tower"
    rows = Dataset.from_list([row("who ?", context, "the man"), row("what ?", "a dog", None, 1)])
    cut = windows(rows, tokenizer, SPEC)
    logits = np.full((len(cut), 16, 2), -1.0, dtype=np.float32)
    first = [index for index, number in enumerate(cut["row"]) if number == 0]
    (other,) = [index for index, number in enumerate(cut["row"]) if number == 1]
    assert len(first) == 1 or len(first) == 2
    token = cut["starts"][first[-1]].index(context.index("cat"))
    logits[first[-1], token] = 3.0
    logits[other, 0], logits[other, 4] = 2.0, 1.5
    contexts = rows["context"][:]
    found = best_answers(logits, cut, contexts)
    assert [item["answer"] for item in found] == ["cat", "a"]
    assert context[found[0]["start"] : found[0]["end"]] == "cat" and found[0]["logit"] == 6.0
    assert [item["answer"] for item in best_answers(logits, cut, contexts, True)] == ["cat", ""]
    # nothing is 4.0, the best answer 3.0: it takes a threshold above 1
    assert best_answers(logits, cut, contexts, True, 0.9)[1]["answer"] == ""
    assert best_answers(logits, cut, contexts, True, 1.0)[1]["answer"] == "a"
    logits[0, 3] = np.nan
    with pytest.raises(ValueError, match="logits: expected finite numbers, found others for question 0"):
        best_answers(logits, cut, contexts)
    with pytest.raises(ValueError, match="logits: expected shape"):
        best_answers(logits[:1], cut, contexts)


def make_data(folder: Path, unanswerable: bool) -> Path:
    """Whose colour is asked for, "red" or "blue", stands in the context; in version 2 sometimes it does not."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, count in (("train", 48), ("validation", 20)):
        rows = []
        for number in range(count):
            filler = list(generator.choice(["cat", "dog", "man", "saw", "tower"], int(generator.integers(6, 20))))
            colour = str(generator.choice(["red", "blue"]))
            filler.insert(int(generator.integers(len(filler))), colour)
            text = None if unanswerable and number % 3 == 0 else colour
            rows.append(row("what", " ".join(filler if text else ["cat", *filler[:3], "."]), text, number))
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def make_recipe(folder: Path, task: str, **changes) -> Recipe:
    training = {
        "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "eval_strategy": "no",
        "logging_steps": 2,
    }  # fmt: skip
    values = {
        "name": "tiny-squad",
        "data": {"task": task, "path": str(folder), "max_length": 16, "doc_stride": 4, "max_query_length": 4},
        "teacher": {"model": str(folder / "bert"), "fine_tune": training},
        "stages": [{"name": "ternary", "training": training | {"eval_strategy": "steps", "eval_steps": 2}}],
    }
    return Recipe.from_dict(values | changes)


@pytest.fixture(scope="module", params=["squad", "squad_v2"])
def finished(request, tmp_path_factory) -> tuple[Path, Recipe, dict]:
    folder = tmp_path_factory.mktemp("squad")
    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        vocab_size=5 + len(WORDS), max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    make_tokenizer(folder / "bert", 32)
    make_data(folder / request.param, unanswerable=request.param == "squad_v2")
    recipe = make_recipe(folder, request.param)
    return folder, recipe, run_recipe(recipe, folder / "run")


@pytest.mark.usefixtures("quick_garbage_collection")
def test_a_recipe_from_end_to_end(finished, capsys):
    folder, recipe, results = finished
    packed = folder / "run" / "packed"
    assert results == read_results(packed / "results.json")
    assert results["main_metric"] == "f1" and results["rows"] == 20
    assert results["packed"]["max_logit_difference"] == 0.0
    assert set(results["packed"]["metrics"]) == {"exact_match", "f1"}
    assert results["packed"]["metrics"] == results["student"]["metrics"] == results["stages"][0]["metrics"]
    assert results["stages"][0]["final_losses"]["loss_logits"] > 0
    log = json.loads((folder / "run" / "stage-0-ternary" / "training" / "log.json").read_text())
    assert [0 <= entry["eval_span_accuracy"] <= 1 for entry in log if "eval_loss" in entry] == [True, True]
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(packed), AutoTokenizer.from_pretrained(packed)
    assert model.is_packed and type(model).__name__ == "TernaryBertForQuestionAnswering"
    golden = json.loads((packed / "golden.json").read_text())
    assert len(golden) == 4
    for asked, text, probability in golden:
        found = answer(model, tokenizer, **asked, unanswerable=recipe.data.task == "squad_v2")
        assert (found["answer"], found["score"]) == (text, probability) and 0 < probability < 1
        assert asked["context"][found["start"] : found["end"]] == text
    card = (packed / "README.md").read_text()
    assert "from trainers.question_answering import answer" in card and "pipeline_tag: question-answering" in card
    command = ["evaluate", str(packed), "--task", recipe.data.task, "--data", str(folder), "--max-length", "32"]
    assert cli.main(command) == 2  # a question of 64 tokens would leave no room
    assert "data.max_length" in capsys.readouterr().err


def test_scores_of_the_run_are_those_of_its_answers_one_by_one(finished):
    """The batch, its order and its padding do not matter."""
    folder, recipe, results = finished
    packed = folder / "run" / "packed"
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(packed), AutoTokenizer.from_pretrained(packed)
    rows = load_data(recipe.data, ["validation"])["validation"]
    cut = windows(rows, tokenizer, recipe.data)
    logits = np.zeros((len(cut), 16, 2), dtype=np.float32)
    for index, window in enumerate(cut):
        inputs = {key: torch.tensor([window[key]]) for key in tokenizer.model_input_names}
        with torch.no_grad():
            output = model.eval()(**inputs)
        values = torch.stack((output.start_logits[0], output.end_logits[0]), -1).numpy()
        logits[index, : len(values)] = values
    task = TASKS[recipe.data.task]
    found = best_answers(logits, cut, rows["context"][:], task.unanswerable)
    gold = [answers["text"] for answers in rows["answers"]]
    assert score(task, [item["answer"] for item in found], gold) == pytest.approx(results["packed"]["metrics"])


def test_what_squad_cannot_do_fails_before_training(finished, tmp_path):
    folder, recipe, _ = finished
    stage = {"quantization": {"bits": "1-1-8"}, "split_megabytes": 1.0}
    with pytest.raises(ValueError, match="adaptive splitting measures gains on classified sentences"):
        run_recipe(make_recipe(folder, recipe.data.task, stages=[stage], family="binary"), tmp_path / "run")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["cat"], "answer_start": [1]}, "answers that stand in the context, found 'cat' at 1 in row 0"),
        ({"text": ["cat"], "answer_start": []}, "many texts as starts in column 'answers', found 1 and 0 in row 0"),
        ({"text": [], "answer_start": []}, "expected an answer, and as many"),
        ("cat", "expected lists 'text' and 'answer_start' in column 'answers'"),
    ],
)  # fmt: skip
def test_wrong_answers_are_named(tmp_path, answers, message):
    line = {"id": "1", "context": "a cat", "question": "who", "answers": answers}
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message):
        load_data(DataSpec(task="squad", path=str(tmp_path)), ["train"])
