import ast
import hashlib
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from trainers import results as results_module
from trainers.card import build_card, write_card


HOSTILE = [
    "two\nlines",
    "---",
    "a\n---\nb: c\n---\n",
    "a\r\n---\r\nb",
    "\x85---\u2028---\u2029",
    "{{ card_data }}{% raw %}",
    "<script>alert(1)</script>",
    "a | b || c",
    "```\n# title\n````",
    "closing\n```\n# fence",
    "`code` [link](http://x) ![image](y) **bold** $x$",
    "'single' \"double\" \\ back",
    "# heading: value # comment",
    "- [ ] &anchor *alias !tag ~",
    "\x00\ud800\ufeff",
    "no",
    "1e5",
]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "ternarybert-sst2"
    folder.mkdir()
    config = {
        "architectures": ["TernaryBertForSequenceClassification"],
        "model_type": "ternary_bert",
        "bits": "2-2-8",
        "weight_quantizer": "twn",
        "quantization_config": {"quant_method": "qbert", "format_version": 1},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    return folder


@pytest.fixture
def results(folder):
    weights = (folder / "model.safetensors").read_bytes()
    rows = {"rows": 872, "sha256": "ab" * 32}
    return {
        "schema": 1,
        "run": "sst2/twn/seed42",
        "recipe": {"name": "minilm", "stages": [{"name": "distil", "quantization": {"bits": "2-2-8"}}]},
        "fingerprint": "cd" * 32,
        "seed": 42,
        "task": "sst2",
        "split": "validation",
        "rows": 872,
        "main_metric": "accuracy",
        "teacher": {"model": "minilm-sst2", "metrics": {"accuracy": 0.9123}, "seed": 7, "bytes": 70_000},
        "student": {"metrics": {"accuracy": 0.9011, "f1": 0.89}},
        "packed": {
            "metrics": {"accuracy": 0.9012, "f1": 0.8899},
            "bytes": len(weights),
            "sha256": hashlib.sha256(weights).hexdigest(),
            "max_logit_difference": 1.25e-6,
        },
        "data": {"train": {"rows": 67349, "sha256": "ef" * 32}, "validation": rows},
        "stages": [{"name": "distil", "steps": 1000, "seconds": 123.4, "final_losses": {"loss_logits": 0.0512}}],
        "versions": {"torch": "2.13.0"},
        "commit": "f" * 40,
        "device": "cpu, 2 threads",
        "seconds": 400.2,
    }


def parts(text):
    """Front matter as the Hub cuts it, parsed, and the body."""
    start, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    assert start == ""
    return yaml.safe_load(front), body


def cells(body, title):
    (line,) = [line for line in body.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_front_matter(folder, results):
    front, _ = parts(write_card(folder, results, base_model="org/minilm", tags=["demo"]).read_text())
    assert {key: front[key] for key in ("license", "base_model", "base_model_relation", "pipeline_tag")} == {
        "license": "apache-2.0",
        "base_model": "org/minilm",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-classification",
    }
    assert front["datasets"] == ["nyu-mll/glue"] and front["metrics"] == ["accuracy", "f1"]
    assert {"qbert", "ternary_bert", "twn", "demo"} <= set(front["tags"])
    (index,) = front["model-index"]
    (entry,) = index["results"]
    assert index["name"] == "ternarybert-sst2"
    assert entry["dataset"] == {"name": "SST-2", "type": "nyu-mll/glue", "config": "sst2", "split": "validation"}
    assert {metric["type"]: metric["value"] for metric in entry["metrics"]} == {"accuracy": 0.9012, "f1": 0.8899}


def test_what_the_results_know_needs_no_telling(folder, results):
    assert not {"base_model", "base_model_relation"} & parts(str(build_card(folder, results)))[0].keys()
    results |= {"base_model": "org/minilm", "limitations": "English alone."}
    front, body = parts(str(build_card(folder, results)))
    assert (front["base_model"], front["base_model_relation"]) == ("org/minilm", "quantized")
    assert "## Limitations\n\nEnglish alone.\n" in body


def test_the_hub_library_reads_the_card_back(folder, results):
    card = build_card(folder, results)
    loaded = ModelCard.load(write_card(folder, results))
    assert loaded.data.to_dict() == card.data.to_dict()
    assert len(loaded.data.eval_results) == 2


def test_body_states_the_measured_numbers(folder, results):
    (folder / ".hidden").write_text("x")
    body = parts(write_card(folder, results, limitations="First.\n\nSecond.").read_text())[1]
    assert "takes 0.01 MB (0.01 MiB), 10.0 times less" in body and "scores 90.12 accuracy x 100 on SST-2" in body
    assert "validation split, 872 rows, seed 42; teacher 91.23" in body
    assert cells(body, "accuracy x 100") == ["91.23", "90.11", "90.12"]
    assert cells(body, "f1 x 100") == ["–", "89.00", "88.99"]
    assert cells(body, "weights file") == ["0.07 MB (0.07 MiB)", "–", "0.01 MB (0.01 MiB)"]
    assert cells(body, "`bits`") == ["`2-2-8`"] and cells(body, "`quantization_config.format_version`") == ["`1`"]
    assert cells(body, "`distil`") == ["1000", "123", "loss_logits 0.0512"]
    digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    assert cells(body, "`config.json`")[1] == f"`{digest}`"
    assert "1.25e-06" in body and "\n\nFirst.\n\nSecond.\n\n" in body and "torch 2.13.0" in body and "f" * 40 in body
    assert ".hidden" not in body and "`README.md`" not in body


def test_writing_twice_gives_the_same_file(folder, results):
    first = write_card(folder, results).read_bytes()
    assert write_card(folder, results).read_bytes() == first


def usage(body):
    return re.search(r"^(```+)python\n(.*?)^\1$", body, re.MULTILINE | re.DOTALL)[2]


def test_usage_is_six_lines_of_python_that_calls_pipeline(folder, results):
    code = usage(parts(str(build_card(folder, results, model_id="me/it's")))[1])
    assert len(code.splitlines()) == 6
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if getattr(call.func, "id", "") == "pipeline"]
    assert call.args[0].value == "text-classification" and call.keywords[0].value.value == "me/it's"


def test_a_pair_task_is_called_with_a_pair(folder, results):
    results.update(task="mrpc")
    assert "'text_pair': " in usage(str(build_card(folder, results)))
    assert "'text_pair': 'there'" in usage(str(build_card(folder, results, example=["hi", "there"])))


def test_own_data_has_no_data_set_id(folder, results):
    results["task"] = None
    front, body = parts(str(build_card(folder, results)))
    assert "datasets" not in front and "on own data" in body


def outside_fences(body):
    kept, fence = [], None
    for line in body.splitlines():
        mark = re.match(r" {0,3}(`{3,})", line)
        if fence is None and mark:
            fence = mark[1]
        elif fence is not None and mark and len(mark[1]) >= len(fence) and line.strip() == mark[1]:
            fence = None
        elif fence is None:
            kept.append(line)
    assert fence is None
    return kept


def shape(body):
    """What a Markdown reader sees as structure: headings, rules and the number of cells of each table row."""
    structure = []
    for line in outside_fences(body):
        if line.startswith("|"):
            structure.append(len(re.findall(r"(?<!\\)\|", line)))
        elif re.match(r"\s{0,3}(#|-{3}|={3}|[-+*>] )", line):
            structure.append(line.split()[0])
    return structure


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_hostile_strings_come_back_equal_and_leave_the_body_whole(folder, results, hostile):
    plain = shape(parts(str(build_card(folder, results, limitations="x")))[1])
    results["run"] = results["device"] = results["fingerprint"] = results["commit"] = hostile
    results["split"] = results["teacher"]["model"] = results["recipe"]["name"] = hostile
    results["recipe"]["stages"][0][hostile] = hostile
    results["stages"][0]["name"] = hostile
    results["stages"][0]["final_losses"] = {hostile: 1.0}
    results["versions"] = {hostile: hostile}
    results["data"] = {"train": results["data"]["train"], hostile: results["data"]["validation"]}
    results["packed"]["metrics"] = {"accuracy": 0.5, hostile: 0.25}
    results_module.validate_results(results, "hostile")
    config = json.loads((folder / "config.json").read_text())
    config["weight_quantizer"] = config["model_type"] = hostile
    (folder / "config.json").write_text(json.dumps(config))
    path = write_card(
        folder,
        results,
        model_id=hostile,
        base_model=hostile,
        license=hostile,
        language=hostile,
        datasets=[hostile],
        tags=[hostile],
        example=[hostile],
        limitations=hostile,
    )
    front, body = parts(path.read_bytes().decode())
    for key in ("license", "language", "base_model"):
        assert front[key] == hostile
    assert front["datasets"] == [hostile] and front["metrics"] == ["accuracy", hostile] and hostile in front["tags"]
    (index,) = front["model-index"]
    (entry,) = index["results"]
    assert index["name"] == hostile and entry["dataset"]["split"] == entry["dataset"]["type"] == hostile
    assert [metric["type"] for metric in entry["metrics"]] == ["accuracy", hostile]
    assert shape(body) == plain
    text = "\n".join(outside_fences(body))
    assert "<script" not in text and "{{" not in text and "{%" not in text
    ast.parse(usage(body))


@pytest.mark.parametrize("what, value", [("bytes", 1), ("sha256", "0" * 64)])
def test_results_of_another_file_are_refused(folder, results, what, value):
    results["packed"][what] = value
    with pytest.raises(ValueError, match=rf"model\.safetensors: packed\.{what}"):
        write_card(folder, results)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize("config", [None, "", "[]", "{}", '{"architectures": ["TernaryBertForMultipleChoice"]}'])
def test_a_folder_that_is_no_packed_classifier_is_refused(folder, results, config):
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match="config.json"):
        build_card(folder, results)


def test_weights_and_results_must_be_there(folder, results):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors"):
        build_card(folder, results)
    del results["packed"]["bytes"]
    with pytest.raises(ValueError, match="packed.bytes"):
        build_card(folder, results)


def test_latency_is_shown_with_what_it_was_measured_on(folder, results):
    assert "## Latency" not in str(build_card(folder, results))
    found = {"cpu": "CPU | 1", "threads": 2, "batch": 1, "rounds": 30, "torch": "2.13.0"}
    rows = [{"tokens": 128, "packed_ms": 22.24, "fp32_ms": 30.5}]
    (folder / "latency.json").write_text(json.dumps(found | {"rows": rows}))
    body = parts(str(build_card(folder, results)))[1]
    assert cells(body, "128") == ["30.5", "22.2"] and "2 threads, batch 1, torch 2.13.0" in body
    (folder / "latency.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="latency.json.*rows"):
        build_card(folder, results)


def test_only_quantizers_in_use_are_named(folder, results):
    config = json.loads((folder / "config.json").read_text())
    for bits, quantizers in (("1-1-4", ["bwn"]), ("2-2-8", ["twn"]), ("1-2-8", ["twn", "bwn"]), ("32-32-32", [])):
        both = {"bits": bits, "weight_quantizer": "twn", "binary_quantizer": "bwn", "planes": 2}
        (folder / "config.json").write_text(json.dumps(config | both))
        front, body = parts(str(build_card(folder, results, limitations="x")))
        assert [tag for tag in front["tags"] if tag in ("twn", "bwn")] == quantizers
        assert ("`planes`" in body) == ("bwn" in quantizers)
