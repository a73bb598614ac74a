"""The committed zoo: every checkpoint in model_cards/ is what its results and card say."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer, pipeline

import modeling_qbert
from modeling_qbert import fused
from trainers.card import build_card
from trainers.question_answering import answer as answer_question
from trainers.recipe import DataSpec
from trainers.results import read_results
from trainers.run import evaluate_checkpoint
from trainers.tasks import get_task


ROOT = Path(__file__).resolve().parents[1]
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/model.safetensors"))
GLUE = ROOT.parent / "shared" / "data"  # development copies of the public data sets

pytestmark = pytest.mark.skipif(not CARDS, reason="no checkpoint is committed in model_cards/")


@pytest.fixture(params=CARDS, ids=lambda path: path.name)
def folder(request) -> Path:
    return request.param


def test_bytes_are_those_of_the_results(folder):
    modeling_qbert.verify_checkpoint(folder)
    results, weights = read_results(folder / "results.json"), folder / "model.safetensors"
    assert results["packed"]["bytes"] == weights.stat().st_size
    assert results["packed"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert results["commit"] and not results["commit"].endswith("-dirty")
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    values = {metric["type"]: metric["value"] for metric in front["model-index"][0]["results"][0]["metrics"]}
    assert values.items() >= results["packed"]["metrics"].items()


def test_the_card_is_what_its_results_make(folder):
    """As `qbert push` makes it anew, under another name: nothing that the card says is known to the card alone."""
    card = (folder / "README.md").read_text()
    name = yaml.safe_load(card.split("---")[1])["model-index"][0]["name"]
    assert str(build_card(folder, read_results(folder / "results.json"), model_id=name)) == card


def test_pipeline_answers_as_recorded(folder):
    """`golden.json`: sentences with the label and score, questions with the answer, or pairs with the cosine of their
    vectors that the checkpoint gave when it was published."""
    golden = json.loads((folder / "golden.json").read_text())
    if isinstance(golden[0][0], dict) and "question" in golden[0][0]:
        model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        unanswerable = read_results(folder / "results.json")["task"] == "squad_v2"
        for asked, text, probability in golden:
            found = answer_question(model, tokenizer, **asked, unanswerable=unanswerable)
            assert (found["answer"], found["score"]) == (text, pytest.approx(probability, abs=2e-2))
        return
    if golden[0][1] == "cosine":
        embed = SentenceTransformer(str(folder), device="cpu")
        for pair, _, cosine in golden:
            first, second = embed.encode([pair["text"], pair["text_pair"]], normalize_embeddings=True)
            assert float(first @ second) == pytest.approx(cosine, abs=2e-2)
        return
    classify = pipeline("text-classification", model=str(folder))
    for text, label, score in golden:
        found = classify(text)
        found = found[0] if isinstance(found, list) else found
        assert found["label"] == label
        # Another CPU may round an exp or a GELU otherwise; an 8-bit code next to a tie then moves by one step.
        assert found["score"] == pytest.approx(score, abs=2e-2)


@torch.no_grad()
def test_engine_and_plain_torch_agree(folder, monkeypatch):
    pytest.importorskip("modeling_qbert.native", reason="no native engine here", exc_type=ImportError)
    (architecture,) = AutoConfig.from_pretrained(folder).architectures
    model = getattr(modeling_qbert, architecture).from_pretrained(folder)
    texts = [
        list(first.values()) if isinstance(first, dict) else [first]
        for first, *_ in json.loads((folder / "golden.json").read_text())
    ]
    given = AutoTokenizer.from_pretrained(folder)(*map(list, zip(*texts)), padding=True, return_tensors="pt")
    fast = model(**given).to_tuple()
    assert model.base_model._fused_engine.encoder is not None
    monkeypatch.setattr(fused, "_answer", lambda *_: None)
    slow = model(**given).to_tuple()
    mask = given["attention_mask"].bool()
    assert len(fast) == len(slow) > 0
    for parts in zip(fast, slow):
        if parts[1].shape[:2] == mask.shape:  # a value or more for each token: the engine leaves out padding
            parts = [part[mask] for part in parts]
        torch.testing.assert_close(*parts, atol=1e-4, rtol=0)


def test_saving_again_gives_the_same_bytes(folder, tmp_path):
    (architecture,) = AutoConfig.from_pretrained(folder).architectures
    getattr(modeling_qbert, architecture).from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_card_has_the_digests_of_the_files_beside_it(folder):
    table = (folder / "README.md").read_text().partition("| file | bytes |")[2]
    rows = re.findall(r"^\| `(\S+)` \| (\d+) \| `([0-9a-f]{64})` \|$", table, re.MULTILINE)
    assert {"config.json", "model.safetensors", "results.json"} <= {name for name, *_ in rows}
    for name, size, digest in rows:
        content = (folder / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (int(size), digest), name


def test_score_of_the_card_is_reproduced_exactly(folder):
    results = read_results(folder / "results.json")
    task, split = results["task"], results["split"]
    if not (GLUE / (get_task(task).name or task) / f"{split}.parquet").exists():
        pytest.skip(f"needs the {split} split of {task}, which the repository does not ship")
    spec = DataSpec(**(results["recipe"]["data"] | {"path": str(GLUE)}))
    found, expected = evaluate_checkpoint(str(folder), spec), results["packed"]["metrics"]
    if "pearson" in expected:  # SciPy's sums differ in the last bit between CPUs; predictions of another bit: by 1e-10
        expected = expected | {"pearson": pytest.approx(expected["pearson"], rel=1e-15)}
    assert found == expected
