"""The runner end to end on a tiny random backbone: teacher, stages, pack, proof in a fresh process, card, resume."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizer,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
    pipeline,
)

import modeling_qbert
from trainers import cli, initialization, run
from trainers.recipe import Recipe
from trainers.results import read_results
from trainers.run import run_recipe


WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "plot", "the", "a", "was", "is"]
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 5 + len(WORDS),
    "max_position_embeddings": 32,
}
BACKBONES = {
    "bert": (BertModel, BertConfig, {}),
    "roberta": (RobertaModel, RobertaConfig, {"pad_token_id": 0, "type_vocab_size": 2}),
    "electra": (ElectraModel, ElectraConfig, {"embedding_size": 24}),
}
FINISHED = ("results.json", "recipe.yaml")


def make_backbone(folder: Path, backbone: str = "bert") -> Path:
    model_class, config_class, fields = BACKBONES[backbone]
    torch.manual_seed(1)
    model_class(config_class(**TINY, **fields)).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizer(vocab=vocabulary, model_max_length=32).save_pretrained(folder)
    return folder


def make_data(folder: Path) -> Path:
    """Sentences whose label is whether their adjective is a good one."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, rows in (("train", 48), ("validation", 24)):
        lines = []
        for _ in range(rows):
            adjective = int(generator.integers(6))
            words = [*generator.choice(WORDS[6:], int(generator.integers(1, 9))), WORDS[adjective]]
            lines.append(json.dumps({"text": " ".join(words), "label": int(adjective < 3)}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def make_recipe(folder: Path, backbone: str = "bert", **changes) -> Recipe:
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 2}
    values = {
        "name": "tiny",
        "data": {"task": "rotten_tomatoes", "path": str(folder / "data"), "max_length": 24},
        "teacher": {"model": str(folder / backbone), "fine_tune": training},
        "stages": [
            {"name": "eight-bit", "quantization": {"bits": "8-8-8"}, "training": training},
            {"name": "ternary", "init": "previous", "training": training},
        ],
    }
    return Recipe.from_dict(values | changes)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runner")
    for backbone in BACKBONES:
        make_backbone(folder / backbone, backbone)
    make_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def finished(workplace) -> tuple[Recipe, Path, dict]:
    recipe, output = make_recipe(workplace), workplace / "finished"
    return recipe, output, run_recipe(recipe, output)


def test_results_and_packed_checkpoint_agree(finished):
    recipe, output, results = finished
    assert results == read_results(output / "results.json") == read_results(output / "packed" / "results.json")
    assert results["fingerprint"] == recipe.fingerprint()
    assert results["packed"]["max_logit_difference"] == 0.0
    assert results["packed"]["metrics"] == results["student"]["metrics"]
    spec, (teacher,) = recipe.data, output.glob("teachers/rotten_tomatoes-????????????/model")
    logits = []
    for folder in (output / "packed", teacher):
        run.evaluate_checkpoint(str(folder), spec, str(output / "logits.safetensors"))
        logits.append(load_file(output / "logits.safetensors")[results["split"]])
    assert results["packed"]["teacher_distance"] == pytest.approx(np.square(logits[0] - logits[1]).mean(), rel=1e-5)
    assert results["packed"]["teacher_distance"] > 0
    assert [stage["name"] for stage in results["stages"]] == ["eight-bit", "ternary"]
    assert {"loss_logits", "loss_hidden_states", "loss_attention_scores"} <= set(results["stages"][1]["final_losses"])
    assert str(output.parent) not in json.dumps(results)  # nothing of this machine in what is published
    model = AutoModelForSequenceClassification.from_pretrained(output / "packed")
    assert model.is_packed and model.config.bits == "2-2-8"
    assert model.config.id2label == {0: "neg", 1: "pos"}
    modeling_qbert.verify_checkpoint(output / "packed")
    for pattern in ("stage-1-ternary/training/training.png", "teachers/*-eight-bit-*/training/training.png"):
        assert [path.stat().st_size > 1000 for path in output.glob(pattern)] == [True]


def test_the_card_reports_the_run(finished):
    _, output, results = finished
    card = (output / "packed" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert not {"base_model", "base_model_relation"} & front.keys()  # the teacher is a folder here
    values = [metric["value"] for metric in front["model-index"][0]["results"][0]["metrics"]]
    assert any(abs(value - results["packed"]["metrics"]["accuracy"]) < 1e-9 for value in values)


def test_pipeline_answers_as_recorded(finished):
    _, output, _ = finished
    classify = pipeline("text-classification", model=str(output / "packed"))
    golden = json.loads((output / "packed" / "golden.json").read_text())
    assert len(golden) == 4
    for text, label, score in golden:
        assert label in ("neg", "pos")
        assert classify(text) == [{"label": label, "score": score}]


def test_a_finished_run_is_not_done_again(finished, monkeypatch):
    recipe, output, results = finished
    monkeypatch.setattr(run._Run, "execute", lambda *_: pytest.fail("a finished run was started again"))
    assert run_recipe(recipe, output) == results


def test_other_rows_or_weights_of_the_same_name_are_another_run(finished, workplace, tmp_path):
    recipe, output, results = finished
    assert len(results["teacher"]["sha256"]) == 64
    for kind in ("data", "bert"):
        (tmp_path / kind).mkdir()
        shutil.copytree(workplace / kind, tmp_path / kind, dirs_exist_ok=True)
    others = [
        dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=str(tmp_path / "data"))),
        dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, model=str(tmp_path / "bert"))),
    ]
    for other in others:  # the same in another place
        assert other.fingerprint() == recipe.fingerprint() and run_recipe(other, output) == results
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines[:-1]))
    model = BertModel.from_pretrained(tmp_path / "bert")
    model.encoder.layer[1].output.dense.bias.data[3] += 1
    model.save_pretrained(tmp_path / "bert")
    for other, name in zip(others, ("rows", "teacher")):
        assert other.fingerprint() == recipe.fingerprint()
        with pytest.raises(ValueError, match=rf"inputs.json: this folder holds a run with other {name}"):
            run_recipe(other, output)
        runs = [run._Run(each, tmp_path / "out", output / "teachers") for each in (recipe, other)]
        assert runs[0].teacher_folder.is_dir() and not runs[1].teacher_folder.exists()


def test_the_distance_is_to_the_teacher_in_full_precision(workplace, tmp_path, monkeypatch):
    """Trained in bfloat16, or nothing trained at all by the process that measures."""
    monkeypatch.setattr(run, "bfloat16_is_fast", lambda: True)
    training = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "bf16": True}
    stages = [{"training": training}]
    recipe = make_recipe(workplace, stages=stages, teacher={"model": str(workplace / "bert"), "fine_tune": training})
    results = run_recipe(recipe, tmp_path)
    (tmp_path / "results.json").unlink()
    assert run_recipe(recipe, tmp_path)["packed"] == results["packed"]


def test_a_folder_keeps_to_its_recipe(finished, workplace):
    _, output, _ = finished
    with pytest.raises(ValueError, match=r"recipe\.yaml: holds another recipe"):
        run_recipe(make_recipe(workplace, seed=7), output)


def test_a_bad_student_fails_before_the_teacher_is_trained(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "FineTuningTrainer", lambda **_: pytest.fail("a teacher was trained"))
    recipe = make_recipe(workplace, stages=[{"quantization": {"bits": "5-2-8"}}])
    with pytest.raises(ValueError, match="bits"):
        run_recipe(recipe, tmp_path / "run")


@pytest.mark.parametrize("backbone", ["roberta", "electra"])
def test_other_backbones(workplace, tmp_path, backbone):
    stages = [{"quantization": {"weight_quantizer": "lat"}, "training": {"max_steps": 3}}]
    recipe = make_recipe(workplace, backbone, stages=stages, packing="dense")
    results = run_recipe(recipe, tmp_path / "run", teachers=workplace / "teachers")
    assert results["packed"]["max_logit_difference"] == 0.0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "packed")
    assert type(model).__name__ == f"Ternary{backbone.capitalize()}ForSequenceClassification"
    assert model.config.quantization_config.packing == "dense"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_binarybert_by_its_recipe(workplace, tmp_path, backbone):
    """Prune, ternarize, split: BinaryBERT's stages as the example recipe has them, W1A4 with learned step sizes."""
    recipe = Recipe.from_yaml(
        Path(__file__).parents[2] / "examples" / "recipes" / "binarybert-w1a4.yaml",
        [
            "data.task=rotten_tomatoes",
            f"data.path={workplace / 'data'}",
            "data.max_length=24",
            f"teacher.model={workplace / backbone}",
            "training.max_steps=3",
            "training.bf16=false",
        ],
    )
    results = run_recipe(recipe, tmp_path / "run", teachers=tmp_path / "teachers")
    assert results["packed"]["max_logit_difference"] == 0.0
    assert [stage["name"] for stage in results["stages"]] == ["half", "ternary-features", "ternary", "split"]
    assert all("accuracy" in stage["metrics"] for stage in results["stages"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "packed")
    config = model.config
    assert (config.bits, config.planes, config.num_attention_heads, config.head_dim) == ("1-1-4", 2, 1, 16)
    assert config.intermediate_size == 24 and config.hidden_act == "relu"
    # A run that ends with an earlier stage finds it done, and a float network ends a run as well.
    half = dataclasses.replace(recipe, last_stage="half")
    first = run_recipe(half, tmp_path / "half", teachers=tmp_path / "teachers")
    assert first["packed"]["metrics"] == results["stages"][0]["metrics"] and first["stages"][0]["steps"] == 3


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_only_where_it_is_fast(workplace, tmp_path, monkeypatch, capfd, fast):
    """Recipes ask for it for speed alone; elsewhere it would be slower than fp32 by far."""
    used = []
    monkeypatch.setattr(run, "bfloat16_is_fast", lambda: fast)
    train = run._Run._train
    monkeypatch.setattr(
        run._Run, "_train", lambda self, trainer, *rest: used.append(trainer.args.bf16) or train(self, trainer, *rest)
    )
    training = {"max_steps": 1, "bf16": True}
    teacher = {"model": str(workplace / "bert"), "fine_tune": training}
    recipe = make_recipe(workplace, teacher=teacher, stages=[{"training": training}])
    results = run_recipe(recipe, tmp_path / "run")
    assert used == [fast, fast]
    assert results["device"].endswith(", fp32 instead of bf16") != fast
    assert ("no fast bfloat16" in capfd.readouterr().err) != fast


def test_adaptive_splitting_by_its_recipe(workplace, tmp_path):
    """Only the chosen modules are ternary and then split, within the size asked for."""
    overrides = [
        "data.task=rotten_tomatoes",
        f"data.path={workplace / 'data'}",
        "data.max_length=24",
        f"teacher.model={workplace / 'bert'}",
        "training.max_steps=3",
        "training.bf16=false",
    ]
    path = Path(__file__).parents[2] / "examples" / "recipes" / "binarybert-adaptive-w1a8.yaml"
    plain_size = 0
    for megabytes, selection in ((None, "gain"), (0.0465, "gain"), (0.0465, "smallest_gain"), (1, "gain")):
        chosen = [f"stages.2.split_megabytes={json.dumps(megabytes)}", f"stages.2.split_selection={selection}"]
        if megabytes is None:
            chosen += ["stages.3.init=previous", "stages.3.quantization.planes=1"]
        output = tmp_path / f"{megabytes}-{selection}"
        results = run_recipe(Recipe.from_yaml(path, overrides + chosen), output, teachers=tmp_path / "teachers")
        config = AutoConfig.from_pretrained(output / "packed")
        size = results["packed"]["bytes"]
        assert results["packed"]["max_logit_difference"] == 0.0 and config.ternary_modules is None
        if megabytes is None:
            plain_size = size
            assert config.planes == 1 and plain_size < 46_500
        else:
            assert config.planes == 2 and plain_size < size <= 1e6 * megabytes
            assert config.split_modules

    def work(folder):
        """Multiply-adds that splitting adds to 128 tokens; an embedding has none."""
        modules = AutoConfig.from_pretrained(tmp_path / folder / "packed").split_modules
        return sum(128 * 32 * (16 if ".attention." in name else 24) for name in modules if "encoder." in name)

    chosen = ["stages.2.split_megabytes=null", "stages.2.split_multiply_adds=0.15"]
    run_recipe(Recipe.from_yaml(path, overrides + chosen), tmp_path / "work", teachers=tmp_path / "teachers")
    assert 0 < work("work") <= 0.15e6 < work("1-gain")

    # Heads and modules ranked in one stage, each by all of the ranking rows.
    values = Recipe.from_yaml(path, [*overrides, "stages.2.split_megabytes=0.0465"]).to_dict()
    stage = values["stages"][2] | {"init": "pruned", "width": 0.5, "teacher": None}
    run_recipe(Recipe.from_dict(values | {"stages": [stage]}), tmp_path / "at once", teachers=tmp_path / "teachers")
    assert AutoConfig.from_pretrained(tmp_path / "at once" / "packed").ternary_modules


def test_killed_and_started_again_ends_in_the_same_file(finished, tmp_path):
    recipe, output, results = finished
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "trainers.cli", "distill", str(recipe_file), "--output", str(tmp_path / "run")]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as this process: sums over a batch depend on it
    # Killed once a checkpoint of the teacher exists, and once one of the second stage does.
    for checkpoint in ("teachers/*/training/checkpoint-*", "stage-1-ternary/training/checkpoint-*"):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=one_thread
        )
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run").glob(checkpoint)):
            assert process.poll() is None, process.stderr.read()[-2000:].decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "run" / "results.json").exists()
    subprocess.run(command, check=True, capture_output=True, env=one_thread)
    assert read_results(tmp_path / "run" / "results.json")["packed"]["sha256"] == results["packed"]["sha256"]


def test_bundled_weights_are_checked(monkeypatch, tmp_path):
    package = tmp_path / "fake_weights"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(initialization.BUNDLED, "hub/model", ("fake_weights", "model", "0" * 64, ""))
    with pytest.raises(ValueError, match=r"model\.safetensors: expected SHA-256 0000"):
        initialization.resolve_model("hub/model")
    monkeypatch.setitem(initialization.BUNDLED, "hub/other", ("no_such_package", "model", "0" * 64, ""))
    assert initialization.resolve_model("hub/other") == "hub/other"


def test_evaluate_info_verify_pack_table(finished, workplace, tmp_path, capsys):
    _, output, results = finished
    packed, data = str(output / "packed"), str(workplace / "data")
    evaluate = ["evaluate", packed, "--task", "rotten_tomatoes", "--data", data, "--max-length", "24"]
    assert cli.main(evaluate) == 0
    assert f"{100 * results['packed']['metrics']['accuracy']:.2f}" in capsys.readouterr().out
    assert cli.main(evaluate[:-2]) == 0  # the tokenizer's own limit
    assert f"{100 * results['packed']['metrics']['accuracy']:.2f}" in capsys.readouterr().out
    assert cli.main([*evaluate, "--split", "train"]) == 0 and "accuracy" in capsys.readouterr().out
    assert cli.main(["verify", packed]) == 0
    assert cli.main(["latency", str(workplace / "bert")]) == 2
    assert "expected the architecture of a packed low-bit model, found BertModel" in capsys.readouterr().err
    assert cli.main(["info", packed]) == 0
    assert "MiB" in capsys.readouterr().out
    latent = str(output / "stage-1-ternary" / "model")
    assert cli.main(["pack", latent, str(tmp_path / "dense"), "--packing", "dense"]) == 0
    evaluate[1] = str(tmp_path / "dense")
    capsys.readouterr()
    assert cli.main(evaluate) == 0
    assert f"{100 * results['packed']['metrics']['accuracy']:.2f}" in capsys.readouterr().out
    assert cli.main(["table", str(output / "results.json"), "--figure", str(tmp_path / "scores.png")]) == 0
    assert (tmp_path / "scores.png").stat().st_size > 1000


def test_a_sweep_from_the_command_line(workplace, tmp_path, capsys):
    stages = [{"name": "distil", "training": {"max_steps": 2}}]
    (tmp_path / "recipe.yaml").write_text(make_recipe(workplace, stages=stages).to_yaml())
    runs = {"twn": None, "row": ["quantization.weight_granularity=per_row"]}
    sweep = {"name": "small", "recipe": "recipe.yaml", "seeds": [1], "runs": runs}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    command = ["sweep", str(tmp_path / "sweep.yaml"), "--output", str(tmp_path / "runs")]
    command += ["--results", str(tmp_path / "results"), "--data", str(workplace / "data")]
    assert cli.main([*command, "--only", "*/twn/*"]) == 0
    assert cli.main(command) == 0
    assert "1 finished, 1 skipped, 0 failed" in capsys.readouterr().out
    assert len(list((tmp_path / "results" / "small").rglob("*.json"))) == 2
    command[command.index("--output") + 1] = str(tmp_path / "another-machine")
    assert cli.main(command) == 0
    assert "0 finished, 2 skipped, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["data.path=X", "seed=3"],
        ["--data.path", "X", "--seed", "3"],
        ["--data.path=X", "--seed=3", "--output", "run"],
        ["seed=3", "--output", "run", "data.path=X"],
    ],
)
def test_overrides_as_words_or_flags(arguments, tmp_path, workplace, monkeypatch):
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(make_recipe(workplace).to_yaml())
    seen = []

    def record(recipe, _):
        seen.append((recipe.data.path, recipe.seed))
        raise ValueError("enough")

    monkeypatch.setattr(run, "run_recipe", record)
    assert cli.main(["distill", str(recipe_file), *arguments]) == 2
    assert seen == [("X", 3)]


@pytest.mark.parametrize(
    "command",
    [["verify", "no-such-folder"], ["info", "no-such-folder"], ["distill", "no.yaml"], ["table", "none.json"]],
)
def test_errors_are_one_line_with_the_file(command, capsys):
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert command[1] in error and "Traceback" not in error
