"""ONNX: small files, 2-bit products, and the packed model's answers from ONNX Runtime alone."""

import json

import pytest
import torch


pytest.importorskip("onnxscript", reason="needs the extra onnx")
onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

import numpy as np  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402
from zoo import BACKBONES, ROOT, build  # noqa: E402

from modeling_qbert import export_onnx, onnx_export, onnx_operators  # noqa: E402
from trainers.cli import main  # noqa: E402


TRAINED = ROOT / "model_cards" / "ternarybert-minilm-sst2"
TEXTS = ["a gripping, funny film", "two hours that feel like four", "dull", "", "not bad , not bad at all " * 20]


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(path, inputs):
    return session(path).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


def products(path):
    """{attribute: values} over all MatMulNBits, and their number."""
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    assert all(node.domain == "com.microsoft" for node in nodes)
    found = [{attribute.name: attribute.i for attribute in node.attribute} for node in nodes]
    return {name: {node[name] for node in found} for name in ("bits", "accuracy_level")}, len(nodes)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The trained MiniLM of the zoo through the command line: (file, folder of the checkpoint)."""
    path = tmp_path_factory.mktemp("onnx") / "new" / "model.onnx"
    assert main(["export", str(TRAINED), "--output", str(path)]) == 0
    return path, TRAINED


def test_the_file_is_as_small_as_the_checkpoint(exported):
    path, folder = exported
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]  # no second file, nothing half-written
    assert path.stat().st_size <= 1.15 * (folder / "model.safetensors").stat().st_size
    assert products(path) == ({"bits": {2}, "accuracy_level": {0}}, 6 * 6 + 1)
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    floats = [name for name, tensor in stored.items() if tensor.data_type == 1 and np.prod(tensor.dims) > 1536 * 8]
    tables = (
        "position_embeddings.weight",
        "word_embeddings.scale",
    )  # all that is large and in float32, as in the file
    assert sorted(floats) == [f"bert.embeddings.{name}" for name in tables]


def test_onnx_runtime_answers_as_the_packed_model(exported):
    path, folder = exported
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    batches = [TEXTS, *([text] for text in TEXTS)]
    for texts in batches:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = model(**batch).logits.numpy()
        np.testing.assert_allclose(run(path, batch)[0], expected, atol=1e-5, rtol=0)
    assert json.loads((folder / "golden.json").read_text())


def test_it_runs_without_this_package(exported, fresh_process):
    path, folder = exported
    found = json.loads(fresh_process("../../examples/onnx_runtime.py", path, folder / "tokenizer.json", *TEXTS[:2]))
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        expected = model(**tokenizer(TEXTS[:2], padding=True, return_tensors="pt")).logits.softmax(-1)
    for text, row, scores in zip(TEXTS, found, expected):
        assert row["text"] == text and row["label"] == model.config.id2label[int(scores.argmax())]
        assert row["score"] == pytest.approx(float(scores.max()), abs=1e-5)


# Every family and backbone once, every head and kind of quantizer at least once; bits of their MatMulNBits.
GROUPS = {"weight_granularity": "per_group", "group_size": 16}
CASES = [
    ("ternary", "bert", "sequence-classification", {"bits": "8-8-8", "position_bits": 8}, 8),
    ("ternary", "roberta", "token-classification", {"bits": "4-4-8", "weight_granularity": "per_row"}, 4),
    ("ternary", "electra", "question-answering", {"bits": "2-2-32", "weight_granularity": "per_row"}, 2),
    ("binary", "bert", "base", {"planes": 1, "activation_quantizer": "pact"}, 2),
    ("binary", "roberta", "multiple-choice", {"planes": 2}, 2),
    ("binary", "electra", "sequence-classification", {"activation_quantizer": "lsq"}, 2),
    ("ghost", "bert", "token-classification", GROUPS | {"embedding_granularity": "per_group"}, 2),
    ("ghost", "roberta", "question-answering", {"bits": "3-3-8", "activation_quantizer": "symmetric"}, 4),
    ("ghost", "electra", "base", {"embedding_granularity": "per_tensor"}, 2),
]


def test_no_family_is_left_out():
    assert [case[:2] for case in CASES] == BACKBONES


@pytest.mark.parametrize("family, backbone, head, fields, bits", CASES)
def test_every_family_and_backbone(family, backbone, head, fields, bits, tmp_path):
    model = build(family, backbone, head, num_hidden_layers=1, **fields)
    model.calibrate(**onnx_export.example_inputs(model, 2, 9))
    made = export_onnx(model, tmp_path / "model.onnx")  # a latent one is packed first
    assert made["bytes"] == (tmp_path / "model.onnx").stat().st_size and made["difference"] <= 1e-5
    assert products(tmp_path / "model.onnx")[0]["bits"] == {bits}
    stored = json.loads(session(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map["config"])
    assert stored["id2label"] == {str(key): label for key, label in model.config.id2label.items()}
    inputs = onnx_export.example_inputs(model, 3, 17, seed=7)
    with torch.no_grad():
        expected = model(**inputs)
    found = run(tmp_path / "model.onnx", inputs)
    assert [output.name for output in session(tmp_path / "model.onnx").get_outputs()] == list(expected)
    for one, two in zip(found, expected.to_tuple(), strict=True):
        one, two = (onnx_export.without_padding(x, inputs["attention_mask"].numpy()) for x in (one, two.numpy()))
        np.testing.assert_allclose(one, two, atol=1e-5, rtol=1e-5)


def test_transformers_exporter_writes_the_same_products(tmp_path):
    """`onnx_operators` is what any exporter may be given; here the one in Transformers."""
    exporters = pytest.importorskip("transformers.exporters.exporter_onnx", reason="Transformers has no exporters yet")
    model = build("ternary", "bert", state="packed", num_hidden_layers=1)
    inputs = onnx_export.example_inputs(model, 2, 9)
    program = exporters.OnnxExporter().export(onnx_operators(model), inputs, config=exporters.OnnxConfig(dynamic=True))
    program.save_pretrained(tmp_path)
    assert products(tmp_path / "model.onnx")[0]["bits"] == {2}
    inputs = onnx_export.example_inputs(model, 3, 17, seed=7)
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    np.testing.assert_allclose(run(tmp_path / "model.onnx", inputs)[0], expected, atol=1e-5)


def test_binary_weights_take_one_bit_on_disk(tmp_path):
    """Matrices too large to be folded when the file is written; ONNX Runtime widens them when it reads it."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = build("binary", "bert", state="packed", **sizes)
    model.save_pretrained(tmp_path)
    made = export_onnx(model, tmp_path / "model.onnx")
    stored = {tensor.name: list(tensor.dims) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    planes = model.config.planes
    for plane in range(planes):
        assert stored[f"bert.encoder.layer.0.output.dense.planes.{plane}.weight"] == [256, 4, 128 // 8]
    packed = (tmp_path / "model.safetensors").stat().st_size
    assert made["bytes"] - packed < 130_000  # operators and constants, which a real model outweighs


REFUSED = [
    ({"activation_granularity": "per_tensor"}, "`activation_granularity` is 'per_tensor'"),
    ({"weight_granularity": "per_group", "group_size": 7}, "layer.0.attention.self.query: config field `group_size`"),
]


@pytest.mark.parametrize("fields, message", REFUSED)
def test_what_onnx_runtime_lacks_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        onnx_operators(build("ternary", "bert", num_hidden_layers=1, **fields))


def test_other_float_types_are_refused():
    model = build("ternary", "bert", state="packed", num_hidden_layers=1).to(torch.bfloat16)
    with pytest.raises(ValueError, match="export needs a model in float32, found torch.bfloat16"):
        onnx_operators(model)


def test_a_wrong_answer_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setitem(onnx_export.KERNEL_BITS, 2, 4)  # bytes of one width said to be of another
    monkeypatch.setattr(onnx_export, "_digits", lambda codes, _: codes + 2)
    with pytest.raises(RuntimeError, match="ONNX Runtime's answers differ by"):
        export_onnx(build("ternary", "bert", num_hidden_layers=1), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(RuntimeError, match=r"pip install 'qbert-zoo\[onnx\]'"):
        export_onnx(build("ternary", "bert", num_hidden_layers=1), tmp_path / "model.onnx")
