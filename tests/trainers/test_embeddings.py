"""Embedding models: what is pooled and compared, and a recipe from a teacher to a sentence-transformers model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.numpy import load_file
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from test_run import WORDS, make_backbone

from trainers.distillation import DistillationArguments, DistillationTrainer
from trainers.embeddings import evaluation, model_inputs
from trainers.losses import embeddings_loss, mean_pool
from trainers.recipe import Recipe
from trainers.run import run_recipe
from trainers.tasks import TASKS


RECIPE = Path(__file__).resolve().parents[2] / "examples" / "recipes" / "embedding-w2a8.yaml"
HIDDEN = torch.arange(24.0).view(2, 3, 4)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def test_padding_is_not_pooled():
    hidden = HIDDEN.clone()
    hidden[0, 2] = torch.nan
    expected = torch.stack([HIDDEN[0, :2].mean(0), HIDDEN[1].mean(0)])
    torch.testing.assert_close(mean_pool(hidden, MASK), expected)


def test_the_loss_is_that_of_directions():
    other = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert float(embeddings_loss(3 * HIDDEN, HIDDEN, MASK)) == pytest.approx(0, abs=1e-6)
    assert float(embeddings_loss(-HIDDEN, HIDDEN, MASK)) == pytest.approx(2)
    each = [float(embeddings_loss(other[i : i + 1], HIDDEN[i : i + 1], MASK[i : i + 1])) for i in range(2)]
    assert float(embeddings_loss(other, HIDDEN, MASK)) == pytest.approx(np.mean(each))
    assert float(embeddings_loss(other, HIDDEN, MASK, count=4)) == pytest.approx(np.sum(each) / 4)
    with pytest.raises(ValueError, match="embeddings: student has shape"):
        embeddings_loss(other[:, :2], HIDDEN, MASK)


def write_pairs(folder: Path) -> Path:
    """Pairs whose rating is the share of words that they have in common."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 40)):
        lines = []
        for _ in range(count):
            first, second = generator.choice(WORDS, 6), generator.choice(WORDS, 6)
            kept = int(generator.integers(7))
            second[:kept] = first[:kept]
            label = 5 * len(set(first) & set(second)) / len(set(first) | set(second))
            lines.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "label": label})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict, Path]:
    """(run folder, results, folder of the pairs) of the committed recipe on a tiny backbone."""
    folder = tmp_path_factory.mktemp("embedding")
    pairs = write_pairs(folder / "data" / "stsb")
    changes = ["max_length=32", f"path={folder / 'data'}"]
    overrides = [f"data.{change}" for change in changes] + [
        f"teacher.model={make_backbone(folder / 'teacher')}",
        "stages.0.training.num_train_epochs=8",
        "stages.0.training.learning_rate=2e-3",
        "stages.0.training.bf16=false",
        "stages.0.training.logging_steps=4",
    ]
    recipe = Recipe.from_yaml(RECIPE, overrides)
    return folder / "run", run_recipe(recipe, folder / "run"), pairs


def test_the_recipe_distils_vectors(finished):
    output, results, _ = finished
    log = json.loads((output / "stage-0-distil/training/log.json").read_text())
    losses = [entry["loss_embeddings"] for entry in log if "loss_embeddings" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert results["stages"][0]["final_losses"].keys() == {"loss", "loss_hidden_states", "loss_embeddings"}
    assert results["main_metric"] == "spearmanr" and results["packed"]["max_logit_difference"] <= 1e-5
    for part in ("teacher", "student", "packed"):
        assert results[part]["metrics"].keys() == {"spearmanr", "pearson"}
    assert results["packed"]["metrics"]["spearmanr"] > 0.5  # random vectors of words: shared ones count


def test_the_packed_model_is_one_of_sentence_transformers(finished, tmp_path):
    output, results, pairs = finished
    rows = [json.loads(line) for line in (pairs / "validation.jsonl").read_text().splitlines()]
    model = SentenceTransformer(str(output / "packed"), device="cpu")
    assert model[0].auto_model.is_packed
    first, second = (model.encode([row[key] for row in rows]) for key in ("sentence1", "sentence2"))
    vectors = load_file(output / "packed-logits.safetensors")[results["split"]]
    np.testing.assert_allclose(np.concatenate((first, second)), vectors, rtol=0, atol=1e-5)

    def correlation(first, second, keep):
        first, second = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (first, second))
        return spearmanr((first * second).sum(1)[keep], np.array([row["label"] for row in rows])[keep]).statistic

    expected = results["packed"]["metrics"]["spearmanr"]
    assert correlation(*np.split(vectors, 2), np.full(len(rows), True)) == pytest.approx(expected, abs=1e-3)
    # Pairs of equal sentences have cosines of 1, whose last digit decides their ranks.
    different = np.array([row["sentence1"] != row["sentence2"] for row in rows])
    assert different.sum() > 20
    one, two = correlation(first, second, different), correlation(*np.split(vectors, 2), different)
    assert one == pytest.approx(two, abs=1e-3)
    model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.array_equal(again.encode([row["sentence1"] for row in rows]), first)
    for asked, name, cosine in json.loads((output / "packed/golden.json").read_text()):
        one, two = model.encode([asked["text"], asked["text_pair"]])
        assert name == "cosine" and one @ two / np.linalg.norm(one) / np.linalg.norm(two) == pytest.approx(
            cosine, abs=1e-5
        )


def test_the_card_shows_how_to_encode(finished):
    text = (finished[0] / "packed" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["pipeline_tag"], front["library_name"]) == ("sentence-similarity", "sentence-transformers")
    assert "SentenceTransformer(" in text


class Letters:
    """Tokenizer of one token a character."""

    model_max_length, model_input_names = 32, ["input_ids", "attention_mask"]

    def num_special_tokens_to_add(self):
        return 2

    def __call__(self, texts, **kwargs):  # noqa: ARG002
        ids = [[1, *map(ord, text), 2] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def test_sentences_are_trained_on_once_and_compared_in_pairs():
    task, columns = TASKS["stsb_embedding"], {"text": ["a", "b", "c"], "text_pair": ["b", "a", "d"]}
    rows = Dataset.from_dict(columns | {"label": [5.0, 0.0, 2.5]})
    spec = Recipe.from_yaml(RECIPE, ["data.max_length=8"]).data
    trained = model_inputs(rows, Letters(), spec)
    assert [ids[1] for ids in trained["input_ids"]] == [ord(letter) for letter in "abcd"]
    inputs, correlate = evaluation(task, rows, Letters(), spec)
    assert [ids[1] for ids in inputs["input_ids"]] == [ord(letter) for letter in "abcbad"]
    first = np.array([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    second = np.array([[7.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # cosines 1, 0 and 0.71
    assert correlate(np.concatenate((first, second)))["spearmanr"] == pytest.approx(1)


def test_a_backbone_has_no_logits_to_distil(tmp_path):
    from transformers import AutoModel

    from modeling_qbert import TernaryBertModel

    folder = make_backbone(tmp_path / "teacher")
    arguments = DistillationArguments(output_dir=str(tmp_path / "out"), report_to="none")
    with pytest.raises(ValueError, match="logits: the student is a backbone without a head; set logits_weight to 0"):
        DistillationTrainer(TernaryBertModel.from_pretrained(folder), AutoModel.from_pretrained(folder), arguments)
