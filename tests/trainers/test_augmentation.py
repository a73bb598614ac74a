"""Augmentation: which words, which candidates, which rows; the same bytes after kill -9; training on it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

from trainers import augmentation, cli
from trainers.augmentation import STOP_WORDS, Proposals, _vocabulary, augment, replaceable, variants
from trainers.data import data_identity, load_augmented, load_data
from trainers.recipe import DataSpec, Recipe
from trainers.run import run_recipe
from trainers.tasks import TASKS


WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "plot", "the", "was", ",", "un", "##kind", "##ly"]
SENTENCES = [
    "the film was good",
    "Awful plot , the film was unkind",
    "great",
    "the , was",
    "a poor plot and a fine film",
    "the film was good",
]


def make_model(folder: Path) -> Path:
    """A masked language model of random weights and the matching tokenizer; `folder`-encoder is one without a head."""
    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        vocab_size=5 + len(WORDS), max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    for name, what in (("mlm", model), ("encoder", BertModel(config))):
        what.save_pretrained(folder / name)
        BertTokenizer(vocab=vocabulary, model_max_length=32).save_pretrained(folder / name)
    return folder


def write_rows(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("augmentation"))
    rows = [{"sentence": text, "label": index % 2} for index, text in enumerate(SENTENCES)]
    write_rows(folder / "data" / "sst2", rows)
    pairs = [{"sentence1": a, "sentence2": b, "label": 0.5} for a, b in zip(SENTENCES, SENTENCES[1:])]
    write_rows(folder / "data" / "stsb", pairs)
    return folder


def sst2(workplace: Path, **changes) -> DataSpec:
    return DataSpec(**({"task": "sst2", "path": str(workplace / "data"), "max_length": 24} | changes))


def read(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_only_alphabetic_words_that_are_no_stop_words_are_replaced():
    text = "The well-made film's 2nd plot isn't THE Best; naïve co2 über"
    assert [text[start:end] for start, end in replaceable(text)] == ["plot", "Best", "naïve", "über"]
    assert {"the", "a", "not", "and", "with", "they"} <= STOP_WORDS and "film" not in STOP_WORDS
    assert all(word.isalpha() and word.islower() for word in STOP_WORDS)


def test_variants_replace_words_and_nothing_else():
    text = "Good  film, the good plot!"
    spans = replaceable(text)
    found = variants(text, spans, [["fine"], [], ["bad", "poor"], ["story"]], 200, 0.4, np.random.default_rng(0))
    expected = {
        f"{first}  film, the {second} {third}!"
        for first in ("Good", "Fine")
        for second in ("good", "bad", "poor")
        for third in ("plot", "story")
    }
    assert set(found) == expected - {text} and len(found) == len(set(found))
    once = variants(text, spans, [["fine"]] * 4, 5, 1.0, np.random.default_rng(0))
    assert once == {"Fine  fine, the fine fine!": ["Fine", "fine", "fine", "fine"]}


def test_words_are_replaced_as_often_as_asked():
    words = [f"{a}{b}" for a in "abcdefghij" for b in "abcdefghij"]
    text = " ".join(words)
    spans = [(3 * index, 3 * index + 2) for index in range(100)]
    found = variants(text, spans, [["xx"]] * 100, 40, 0.4, np.random.default_rng(0))
    assert len(found) == 40
    assert np.mean([copy.count("xx") for copy in found]) == pytest.approx(40, abs=3)


def test_the_masked_model_sees_the_masked_sentence_and_the_original(workplace):
    """Against a forward pass spelled out here."""
    proposals = Proposals(str(workplace / "mlm"), "masked-lm", 8)
    text = "the plot was good"
    tokenizer, model = proposals.tokenizer, proposals.model
    found = proposals(text, replaceable(text))
    for word, candidates in zip(("plot", "good"), found, strict=True):
        inputs = tokenizer(text.replace(word, "[MASK]"), text, return_tensors="pt")
        place = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
        with torch.no_grad():
            best = model(**inputs).logits[0, place].topk(8).indices.tolist()
        pieces = tokenizer.convert_ids_to_tokens(best)
        assert candidates == [piece for piece in pieces if piece.isalpha()] and len(candidates) < 8


def test_words_of_several_pieces_and_late_words_get_neighbours(workplace):
    proposals = Proposals(str(workplace / "mlm"), "masked-lm", 3)
    table = proposals.model.get_input_embeddings().weight.detach()
    ids = proposals.tokenizer("unkindly", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    unit = torch.nn.functional.normalize(table, dim=-1)
    cosines = {word: float(unit[5 + i] @ unit[ids].mean(0)) for i, word in enumerate(WORDS) if word.isalpha()}
    nearest = sorted(cosines, key=cosines.get, reverse=True)[:3]
    assert proposals("unkindly", [(0, 8)]) == [nearest]
    assert proposals("zzz", [(0, 3)]) == [[]]  # unknown to the vocabulary: it stays
    long = " ".join(["was"] * 20) + " good"
    assert proposals(long, replaceable(long)) == [proposals.neighbours("good")]
    assert "good" not in proposals.neighbours("good")


def test_neighbours_need_no_masked_model(workplace):
    with pytest.raises(ValueError, match="expected a masked language model, found none of its tensors"):
        Proposals(str(workplace / "encoder"), "masked-lm")
    proposals = Proposals(str(workplace / "encoder"), "neighbours", 2)
    text = "Good plot"
    assert proposals(text, replaceable(text)) == [proposals.neighbours("good"), proposals.neighbours("plot")]
    assert all(len(words) == 2 for words in proposals(text, replaceable(text)))


def test_vocabularies_with_marked_spaces():
    class Marked:
        all_special_tokens = ["<s>"]
        pieces = ["<s>", "Ġfilm", "ing", "Ġ9", "Ġplot", "s"]

        def __len__(self):
            return len(self.pieces)

        def convert_ids_to_tokens(self, ids):
            return [self.pieces[index] for index in ids]

    assert _vocabulary(Marked(), 7) == [None, "film", None, None, "plot", None, None]


def test_originals_stay_labels_are_kept_and_copies_differ(workplace, tmp_path):
    made = augment(sst2(workplace), tmp_path / "out", str(workplace / "mlm"), copies=4)
    rows = read(tmp_path / "out")
    assert made == {"rows": 6, "augmented": len(rows)} and set(rows[0]) == {"sentence", "label"}
    originals = [index for index, row in enumerate(rows) if row["sentence"] in SENTENCES]
    assert [rows[index]["sentence"] for index in originals] == SENTENCES
    for number, (begin, end) in enumerate(zip(originals, [*originals[1:], len(rows)])):
        group = rows[begin:end]
        assert {row["label"] for row in group} == {number % 2}
        assert len({row["sentence"] for row in group}) == len(group) <= 5
    assert originals[1] - originals[0] > 1 and originals[4] - originals[3] == 1  # stop words only: nothing to replace


def test_pairs_change_one_sentence_at_a_time(workplace, tmp_path):
    augment(sst2(workplace, task="stsb"), tmp_path / "out", str(workplace / "encoder"), mode="neighbours", copies=5)
    rows, current, changed = read(tmp_path / "out"), None, set()
    pairs = set(zip(SENTENCES, SENTENCES[1:]))
    for row in rows:
        found = (row["sentence1"], row["sentence2"])
        assert row["label"] == 0.5
        if found in pairs:
            current = found
            continue
        sides = [side for side in (0, 1) if found[side] != current[side]]
        assert len(sides) == 1
        changed.add(sides[0])
    assert changed == {0, 1}


def test_answers_stay_and_move_with_the_words_before_them(workplace, tmp_path):
    """All answers of a row; a word that an answer has a part of; "great" and "awful" have different lengths."""
    context = "The bad plot, good films: the Awful film was great"
    spans = [("good film", 14), ("film was", 36), ("plot, good", 8)]
    answers = {"text": [text for text, _ in spans], "answer_start": [start for _, start in spans]}
    rows = [
        {"id": "a", "context": context, "question": "the bad plot was", "answers": answers},
        {"id": "b", "context": "great", "question": "the", "answers": {"text": ["great"], "answer_start": [0]}},
    ]
    write_rows(tmp_path / "data" / "squad", rows)
    spec = DataSpec(task="squad", path=str(tmp_path / "data"), augmented=str(tmp_path))
    with pytest.raises(ValueError, match="copies: squad is not augmented by default"):
        augment(spec, tmp_path / "squad", str(workplace / "mlm"))
    augment(spec, tmp_path / "squad", str(workplace / "mlm"), copies=30)
    found = load_augmented(spec, load_data(spec, ["train"])["train"]).to_list()  # raises where answers do not stand
    assert [row for row in found if row["id"] == "b"] == rows[1:] and found[0] == rows[0]
    questions = [row for row in found[1:-1] if row["question"] != rows[0]["question"]]
    contexts = [row for row in found[1:-1] if row["context"] != context]
    assert len(questions) > 5 and len(contexts) > 5 and len(questions) + len(contexts) == len(found) - 2
    assert all(row["context"] == context and row["answers"] == answers for row in questions)
    assert all(row["question"] == rows[0]["question"] for row in contexts)
    assert all(row["answers"]["text"] == answers["text"] for row in contexts)
    words = zip(*(row["context"].replace(",", "").replace(":", "").split() for row in contexts), strict=True)
    assert [len(set(seen)) > 1 for seen in words] == [word in ("bad", "Awful", "great") for word in context.split()]
    assert len({tuple(row["answers"]["answer_start"]) for row in contexts}) > 2


def test_a_row_depends_on_neither_shards_nor_other_rows(workplace, tmp_path):
    options = {"copies": 6, "seed": 3}
    model = str(workplace / "mlm")
    augment(sst2(workplace), tmp_path / "one", model, shard_rows=100, **options)
    augment(sst2(workplace), tmp_path / "two", model, shard_rows=2, **options)
    assert read(tmp_path / "one") == read(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("*.parquet"))) == 3
    write_rows(tmp_path / "data", [{"sentence": text, "label": 0} for text in ["bad", *SENTENCES[1:3]]])
    augment(sst2(workplace, path=str(tmp_path / "data")), tmp_path / "three", model, **options)
    texts, others = ([row["sentence"] for row in read(tmp_path / name)] for name in ("one", "three"))
    begin, end = texts.index(SENTENCES[1]), texts.index(SENTENCES[3])
    assert others[others.index(SENTENCES[1]) :] == texts[begin:end]
    augment(sst2(workplace), tmp_path / "four", model, copies=6, seed=4)
    assert read(tmp_path / "four") != read(tmp_path / "one")


def test_killed_and_started_again_ends_in_the_same_bytes(workplace, tmp_path):
    write_rows(tmp_path / "data" / "sst2", [{"sentence": SENTENCES[i % 6], "label": 0} for i in range(600)])
    shown = [
        "augment", "--task", "sst2", "--data", str(tmp_path / "data"), "--model", str(workplace / "mlm"),
        "--copies", "30",
    ]  # fmt: skip
    code = "import sys, trainers.augmentation as a; a.SHARD_ROWS = 20; a.augment.__kwdefaults__['shard_rows'] = 20;"
    code += "from trainers.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *shown, "--output", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder, deadline = tmp_path / "killed" / "sst2", time.monotonic() + 120
    while len(list(folder.glob("rows-*.parquet"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = {path.name: path.stat().st_mtime_ns for path in folder.glob("rows-*.parquet")}
    assert 3 <= len(begun) < 30, "it was killed too late to show anything"
    with pytest.raises(ValueError, match="expected 30 shards, missing"):
        spec = sst2(workplace, path=str(tmp_path / "data"), augmented=str(tmp_path / "killed"))
        load_augmented(spec, load_data(spec, ["train"])["train"])
    subprocess.run(command, check=True, capture_output=True, env=os.environ)
    spec = sst2(workplace, path=str(tmp_path / "data"))
    augment(spec, tmp_path / "whole", str(workplace / "mlm"), copies=30, shard_rows=20)
    for path in (tmp_path / "whole").glob("rows-*.parquet"):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert all((folder / name).stat().st_mtime_ns == stamp for name, stamp in begun.items())  # not made again


def test_a_folder_keeps_to_its_augmentation(workplace, tmp_path):
    model = str(workplace / "encoder")
    augment(sst2(workplace), tmp_path, model, mode="neighbours", copies=2)
    with pytest.raises(ValueError, match=r"augmentation.json: holds another augmentation \(copies, seed differ\)"):
        augment(sst2(workplace), tmp_path, model, mode="neighbours", copies=3, seed=1)
    with pytest.raises(ValueError, match=r"another augmentation \(shard_rows differ\)"):
        augment(sst2(workplace), tmp_path, model, mode="neighbours", copies=2, shard_rows=499)
    torch.manual_seed(5)
    other = tmp_path / "other"
    BertModel(BertConfig.from_pretrained(model)).save_pretrained(other)
    Proposals(model, "neighbours").tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="weights"):
        augment(sst2(workplace), tmp_path, str(other), mode="neighbours", copies=2)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"task": None, "text": "sentence", "label": "label"}, {}, "copies: own data is not augmented by default"),
        ({}, {"copies": 0}, "copies: expected at least 1, found 0"),
        ({}, {"probability": 0.0}, r"probability: expected a number in \(0, 1\], found 0.0"),
    ],
)
def test_wrong_numbers_are_named(workplace, tmp_path, changes, options, message):
    spec = sst2(workplace, **({"path": str(workplace / "data" / "sst2")} | changes))
    with pytest.raises(ValueError, match=message):
        augment(spec, tmp_path, str(workplace / "mlm"), **options)


def test_copies_are_those_of_tinybert_and_mnli_and_qqp_have_none():
    copies = {name: task.copies for name, task in TASKS.items() if task.copies}
    assert copies == {"cola": 30, "mrpc": 30, "sst2": 20, "stsb": 30, "qnli": 20, "rte": 30}
    assert (augmentation.CANDIDATES, augmentation.PROBABILITY) == (15, 0.4)


def test_a_stage_trains_on_augmented_rows(workplace, tmp_path, capsys):
    command = ["augment", "--task", "sst2", "--data", str(workplace / "data"), "--model", str(workplace / "mlm")]
    assert cli.main([*command, "--copies", "3", "--output", str(tmp_path / "augmented")]) == 0
    assert f"data.augmented={tmp_path / 'augmented'}" in capsys.readouterr().out
    training = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "eval_strategy": "no"}
    values = {
        "name": "tiny",
        "data": {**vars(sst2(workplace)), "augmented": str(tmp_path / "augmented")},
        "teacher": {"model": str(workplace / "encoder"), "fine_tune": training},
        "stages": [
            {"name": "eight-bit", "quantization": {"bits": "8-8-8"}, "training": training},
            {"name": "ternary", "init": "previous", "augmented": True, "training": training},
        ],
    }
    recipe = Recipe.from_dict(values)
    results = run_recipe(recipe, tmp_path / "run")
    spec = recipe.data
    rows = load_augmented(spec, load_data(spec, ["train"])["train"])
    assert len(rows) > 8 and results["data"]["augmented"] == data_identity(rows)
    assert [stage["steps"] for stage in results["stages"]] == [2, -(-len(rows) // 4)]
    assert str(tmp_path) not in json.dumps(results)
    # Rows made of another training split are refused.
    with pytest.raises(ValueError, match="expected rows made of this training split"):
        run_recipe(Recipe.from_dict(values | {"data": values["data"] | {"max_train_samples": 3}}), tmp_path / "other")
    with pytest.raises(ValueError, match="stages.1.augmented: expected data.augmented to be given"):
        Recipe.from_dict(values | {"data": vars(sst2(workplace))})
    # What does not use them does not know them: teacher and first stage are shared with recipes without.
    plain = json.loads(json.dumps(values))
    plain["stages"][1]["augmented"], plain["data"]["augmented"] = False, None
    run_recipe(Recipe.from_dict(plain), tmp_path / "plain", teachers=tmp_path / "run" / "teachers")
    assert len(list((tmp_path / "run" / "teachers").glob("sst2-*/model"))) == 2
    assert "augmented" not in json.dumps(Recipe.from_dict(plain).portable())
