"""A saved model opens on a machine without this package: its files carry the code, config.json names every head."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import inputs
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from zoo import BACKBONES, EVERY_HEAD, FAMILIES, build

import modeling_qbert


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def expected(model, given):
    with torch.no_grad():
        return model(**given, return_dict=True).to_tuple()


def assert_answers(path, parts):
    found = load_file(path)
    assert len(found) == len(parts)
    for index, part in enumerate(parts):
        assert torch.equal(found[str(index)], part)


def test_every_head_and_state_without_the_package(fresh_process, tmp_path):
    jobs, wanted = [], []
    for family, backbone, head in EVERY_HEAD:
        # Without padding: what a hidden position holds, 0 or something, depends on whether the native engine runs.
        given = inputs(head) | {"attention_mask": torch.ones_like(inputs(head)["attention_mask"])}
        save_file(given, tmp_path / f"{head}.inputs")
        for state in ("latent", "packed"):
            model = build(family, backbone, head, state)
            folder = save(model, tmp_path / family / backbone / head / state)
            answer = tmp_path / f"{family}-{backbone}-{head}-{state}.answer"
            jobs.append([model._auto_class, str(folder), str(tmp_path / f"{head}.inputs"), str(answer)])
            wanted.append((type(model).__name__, answer, expected(model, given)))
    lines = fresh_process("load_remote.py", "hidden", json.dumps(jobs)).splitlines()
    assert len(lines) == len(wanted) == 2 * len(EVERY_HEAD)
    for line, (name, answer, parts) in zip(lines, wanted):
        module, _, found = json.loads(line)
        assert module.startswith("transformers_modules.") and found == name
        assert_answers(answer, parts)


@pytest.fixture
def trained_job(trained, tmp_path):
    """[auto class, folder, inputs, answer] of the trained model saved with its code, and what it must answer."""
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    given = dict(
        tokenizer(["a gripping, funny film", "two hours that feel like four"], padding=True, return_tensors="pt")
    )
    save_file(given, tmp_path / "inputs")
    folder = save(model, tmp_path / "trained")
    tokenizer.save_pretrained(folder)
    job = ["AutoModelForSequenceClassification", str(folder), str(tmp_path / "inputs"), str(tmp_path / "answer")]
    return job, expected(model, given)


def test_trained_weights_answer_bit_for_bit(trained_job, trained, fresh_process, tmp_path):
    job, parts = trained_job
    loaded, classified = map(json.loads, fresh_process("load_remote.py", "hidden", json.dumps([job])).splitlines())
    assert loaded[0].startswith("transformers_modules.")
    text, label, score = json.loads((trained / "golden.json").read_text())[0]
    assert text == "a gripping, funny film" and classified["label"] == label
    assert classified["score"] == pytest.approx(score, abs=2e-2)
    assert_answers(tmp_path / "answer", parts)
    again = Path(job[3] + "-again")
    names = {path.name for path in Path(job[1]).iterdir()}
    assert names - {path.name for path in again.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    for path in again.iterdir():  # remote code saves what the package saves, its own code included
        assert path.read_bytes() == (Path(job[1]) / path.name).read_bytes(), path.name
    assert (again / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_the_package_wins_where_it_is_installed(trained_job, fresh_process, tmp_path):
    job, parts = trained_job
    for path in Path(job[1]).glob("*.py"):  # were the folder's code used, this would show
        path.write_text("raise RuntimeError('code of the folder')\n")
    lines = fresh_process("load_remote.py", "installed", json.dumps([job])).splitlines()
    module, config, _ = json.loads(lines[0])
    assert module == "modeling_qbert.modeling_ternary" and config == "modeling_qbert.configuration_qbert"
    assert_answers(tmp_path / "answer", parts)


def test_a_copy_of_the_code_leaves_the_package_in_charge(tmp_path, monkeypatch):
    """Remote code in a process that also has the package: each model keeps to its own classes, in any order."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model, given = build("binary", "bert", activation_quantizer="lsq"), inputs()
    model.calibrate(**given)
    folder = save(model.pack(), tmp_path / "saved")
    registered = dict(transformers.AttentionInterface())
    remote = transformers.dynamic_module_utils.get_class_from_dynamic_module(
        "modeling_binary.BinaryBertForSequenceClassification", str(folder)
    )
    assert remote is not type(model) and remote.__module__.startswith("transformers_modules.")
    for kind in (remote, type(model), remote):
        loaded = kind.from_pretrained(folder)
        assert type(loaded) is kind and loaded.is_packed
        assert torch.equal(expected(loaded, given)[0], expected(model, given)[0])
    assert type(AutoModelForSequenceClassification.from_pretrained(folder)) is type(model)
    # Models without quantized layers too: a teacher's dropout would follow the copy, which has no engine.
    for name in ("qbert", "qbert_scores"):
        assert transformers.AttentionInterface()[name] is registered[name]


@pytest.mark.parametrize("state", ["latent", "packed"])
@pytest.mark.parametrize("family, backbone", BACKBONES)
def test_only_what_is_needed_travels(family, backbone, state, tmp_path):
    """Flat modules that import each other in the one form Transformers follows; no card, tests or command line."""
    folder = save(build(family, backbone, state=state), tmp_path)
    code = {path.stem for path in folder.glob("*.py")}
    assert f"modeling_{family}" in code and not code & {"report", "__init__"}
    package = Path(modeling_qbert.__file__).parent
    for name in code:
        text = (folder / f"{name}.py").read_text()
        assert text == (package / f"{name}.py").read_text()
        assert not re.search(r"^\s*(from modeling_qbert|import modeling_qbert|from trainers)", text, re.MULTILINE)
        assert set(re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)) <= code
    assert {path.suffix for path in folder.iterdir()} == {".py", ".json", ".safetensors"}


@pytest.mark.parametrize("family, backbone, head", EVERY_HEAD)
def test_config_names_every_head(family, backbone, head, tmp_path):
    build(family, backbone, head).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    heads = FAMILIES[family][backbone].values()
    assert (
        auto_map.pop("AutoConfig") == f"configuration_qbert.{FAMILIES[family][backbone]['base'].config_class.__name__}"
    )
    assert auto_map == {kind._auto_class: f"modeling_{family}.{kind.__name__}" for kind in heads}
    assert len(auto_map) == 6


def test_a_dequantized_model_is_plain(tmp_path):
    """It has no code of ours to point to."""
    model = build("ternary", "bert")
    model.save_pretrained(tmp_path / "latent")
    loaded = type(model).from_pretrained(tmp_path / "latent")
    loaded.pack().dequantize().save_pretrained(tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert not list((tmp_path / "plain").glob("*.py"))
