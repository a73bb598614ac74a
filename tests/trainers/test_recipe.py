"""Recipes: what is read equals what was written, and every mistake is named."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest
import yaml

from trainers.recipe import DataSpec, QuantizationSpec, Recipe, Stage, Targets, TeacherSpec


EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))

MINIMAL = {
    "name": "tiny",
    "data": {"task": "sst2"},
    "teacher": {"model": "some/teacher"},
    "stages": [{"training": {"learning_rate": "2e-5", "num_train_epochs": 3}}, {"name": "second", "init": "previous"}],
}


def minimal(**changes):
    return {**json.loads(json.dumps(MINIMAL)), **changes}


def write(tmp_path, values) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def test_defaults_and_types_are_filled_in():
    recipe = Recipe.from_dict(MINIMAL)
    assert recipe.family == "ternary" and recipe.packing == "2bit" and recipe.seed == 42
    assert recipe.data == DataSpec(task="sst2") and recipe.teacher == TeacherSpec(model="some/teacher")
    assert recipe.stages[0].training == {"learning_rate": 2e-5, "num_train_epochs": 3.0}
    assert isinstance(recipe.stages[0].training["num_train_epochs"], float)
    assert recipe.stages[1] == Stage(name="second", init="previous")
    assert recipe.stages[1].quantization == QuantizationSpec() and recipe.stages[1].targets == Targets()


def test_a_recipe_cannot_be_changed():
    recipe = Recipe.from_dict(MINIMAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1


def test_yaml_and_dict_round_trips(tmp_path):
    overrides = ["teacher.fine_tune.learning_rate=1e-4", "data.path=/data/ä", "targets.logits=0.5"]
    recipe = Recipe.from_yaml(write(tmp_path, MINIMAL), overrides)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_yaml(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_name_their_command(path):
    recipe = Recipe.from_yaml(path)
    assert recipe.name == path.stem
    opening = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(f"qbert distill examples/recipes/{path.name}" in line for line in opening)


def test_there_are_shipped_recipes():
    assert {"demo", "ternarybert-w2a8"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("data.task=mrpc", lambda r: r.data.task == "mrpc"),
        ("data.path=examples/data", lambda r: r.data.path == "examples/data"),
        ("data.max_train_samples=64", lambda r: r.data.max_train_samples == 64),
        ("data.max_train_samples=null", lambda r: r.data.max_train_samples is None),
        ("stages.0.training.learning_rate=1e-4", lambda r: r.stages[0].training["learning_rate"] == 1e-4),
        ("stages.1.training.max_steps=5", lambda r: r.stages[1].training == {"max_steps": 5}),
        ("quantization.bits=2-2-4", lambda r: [s.quantization.bits for s in r.stages] == ["2-2-4", "2-2-4"]),
        ("targets.hidden_states=0", lambda r: [s.targets.hidden_states for s in r.stages] == [0.0, 0.0]),
        ("without_dropout=true", lambda r: [s.without_dropout for s in r.stages] == [True, True]),
        ("teacher_dropout=true", lambda r: [s.teacher_dropout for s in r.stages] == [True, True]),
        ("teacher.fine_tune={learning_rate: 5e-5}", lambda r: r.teacher.fine_tune == {"learning_rate": 5e-5}),
        ("seed=7", lambda r: r.seed == 7),
        ("name=other", lambda r: r.name == "other" and r.stages[0].name == "distil"),
    ],
)
def test_overrides(tmp_path, override, read):
    path = write(tmp_path, MINIMAL)
    assert not read(Recipe.from_yaml(path)) or override == "data.max_train_samples=null"
    assert read(Recipe.from_yaml(path, [override]))


def test_an_override_of_one_stage_leaves_those_that_share_its_yaml():
    recipes = EXAMPLES[0].parent
    training = Recipe.from_yaml(recipes / "binarybert-w1a8.yaml", ["stages.3.training.num_train_epochs=7"]).stages
    assert [stage.training["num_train_epochs"] for stage in training] == [3, 3, 3, 7]
    targets = Recipe.from_yaml(recipes / "progressive.yaml", ["stages.0.targets.logits=0"]).stages
    assert {stage.name: stage.targets.logits for stage in targets} == {"w4": 1, "w2": 1, "w1": 1, "w1a8": 0}


def test_the_last_override_wins(tmp_path):
    recipe = Recipe.from_yaml(write(tmp_path, MINIMAL), ["seed=1", "seed=2"])
    assert recipe.seed == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sede": 1}, r"sede: unknown key; did you mean 'seed'\?"),
        ({"zzz": 1}, "zzz: unknown key; known keys: name, family, data"),
        ({"data": {"tsk": "sst2"}}, r"data.tsk: unknown key; did you mean 'task'\?"),
        ({"data": {}}, "data.task: expected a task name, or the columns of your own data"),
        ({"data": {"task": "sst2", "max_length": "long"}}, "data.max_length: expected int, found str 'long'"),
        ({"data": {"task": "sst2", "max_length": 12.5}}, "data.max_length: expected int, found float 12.5"),
        ({"data": {"task": "sst2", "max_length": True}}, "data.max_length: expected int, found bool True"),
        ({"data": {"task": "sst2", "max_length": 0}}, "data.max_length: expected a positive number, found 0"),
        ({"data": {"task": "sst2", "max_train_samples": "a"}}, "samples: expected int or null, found str 'a'"),
        ({"data": {"task": "sst2", "eval_split": "train"}}, "data.eval_split: expected a split other than"),
        ({"data": {"task": "sst2", "path": ""}}, "data.path: expected a non-empty string"),
        ({"data": ["sst2"]}, "data: expected a mapping, found"),
        ({"teacher": {}}, "teacher.model: expected a value, found 'nothing'"),
        ({"teacher": {"model": 3}}, "teacher.model: expected str, found int 3"),
        ({"teacher": {"model": ""}}, "teacher.model: expected a Hub id or a local folder"),
        ({"teacher": {"model": "m", "fine_tune": {"lr": 1}}}, "teacher.fine_tune.lr: unknown key"),
        ({"name": "../up"}, "name: expected a folder name"),
        ({"name": ""}, "name: expected a folder name"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"seed": 1.5}, "seed: expected int, found float 1.5"),
        ({"packing": "3bit"}, "packing: expected one of '2bit', 'dense', found '3bit'"),
        ({"stages": []}, "stages: expected at least one stage"),
        ({"stages": {"name": "x"}}, "stages: expected a list"),
        ({"stages": [{}, {}]}, "stages: expected a different name for every stage"),
        ({"stages": [{"init": "previous"}]}, "stages.0.init: expected one of .'teacher', 'pruned'"),
        ({"stages": [{"init": "random"}]}, "stages.0.init: expected one of 'teacher', 'previous', .*found 'random'"),
        ({"schedule": ["distil", "third"]}, "schedule.1: expected one of .'second'., found 'third'"),
        ({"schedule": ["distil", "distil"]}, "schedule.1: expected one of .'second'., found 'distil'"),
        ({"total_steps": 5}, "stages.1.training.num_train_epochs: expected a share of total_steps, found None"),
        ({"total_steps": 0, "stages": [{"training": {"num_train_epochs": 1}}]}, "total_steps: expected at least a"),
        (
            {"total_steps": 5, "stages": [{"training": {"num_train_epochs": 1, "max_steps": 5}}]},
            "stages.0.training: expected total_steps or max_steps, not both",
        ),
        ({"stages": [{"start": "distil"}]}, "stages.0.start: expected nothing for init 'teacher'"),
        ({"stages": [{}, {"name": "b", "init": "previous", "start": "c"}]}, "stages.1.start: expected one of .None"),
        ({"stages": [{"split_megabytes": 3}]}, "split_megabytes: expected a stage of binary weights, bits 1-1-A"),
        (
            {"stages": [{"split_multiply_adds": 0, "quantization": {"bits": "1-1-8"}}]},
            "stages.0.split_multiply_adds: expected a finite number above 0, found 0.0",
        ),
        (
            {"stages": [{"split_multiply_adds": 9, "quantization": {"bits": "1-1-8", "planes": 2}}]},
            "stages.0.split_multiply_adds: expected one plane, before the splitting",
        ),
        (
            {"stages": [{"split_megabytes": 3, "split_multiply_adds": 9, "quantization": {"bits": "1-1-8"}}]},
            "stages.0.split_multiply_adds: expected nothing beside split_megabytes, found 9.0",
        ),
        ({"stages": [{"temperature": 0}]}, "stages.0.temperature: expected above 0, found 0.0"),
        ({"stages": [{"temperature": ".nan"}]}, "stages.0.temperature: expected a number, found str '.nan'"),
        ({"stages": [{"temperature": float("inf")}]}, "stages.0.temperature: expected a finite number"),
        ({"stages": [{"targets": {"logits": -1}}]}, "stages.0.targets.logits: expected a finite weight of at least 0"),
        (
            {"stages": [{"targets": {"logits": 0, "hidden_states": 0, "attention_scores": 0}}]},
            "embeddings, labels: expected at least one positive weight",
        ),
        ({"stages": [{"quantization": {"bits": "2-8"}}]}, "stages.0.quantization.bits: expected W-E-A"),
        ({"stages": [{"quantization": {"bits": 228}}]}, "stages.0.quantization.bits: expected str, found int 228"),
        ({"stages": [{"quantization": {"weight_quantizer": "lta"}}]}, "expected one of 'twn', 'lat', found 'lta'"),
        ({"stages": [{"quantization": {"group_size": 0}}]}, "group_size: expected a positive number"),
        ({"stages": [{"training": {"learning_rat": 1}}]}, "learning_rat: unknown key; did you mean 'learning_rate'"),
        ({"stages": [{"training": {"learning_rate": "fast"}}]}, "learning_rate: expected a number, found str 'fast'"),
        ({"stages": [{"training": {"max_steps": 1.5}}]}, "stages.0.training.max_steps: expected int, found float 1.5"),
        ({"stages": [{"training": {"output_dir": "x"}}]}, "training.output_dir: the runner sets it"),
        ({"stages": [{"training": {"seed": 1}}]}, "training.seed: the runner sets it"),
        ({"stages": [{"training": {"eval_strategy": False}}]}, "YAML reads yes, no, on, off as flags"),
        ({"stages": [{"training": {"lr_scheduler_type": "liner"}}]}, "lr_scheduler_type: expected one of 'linear'"),
        ({"stages": [{"training": {"fp16": "yes please"}}]}, "training.fp16: expected bool, found str"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_file_and_field(tmp_path, change, message):
    path = write(tmp_path, minimal(**change))
    with pytest.raises(ValueError, match=message) as error:
        Recipe.from_yaml(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key=value"),
        ("=1", "expected key=value"),
        ("data..task=1", "expected key=value"),
        ("data.tsak=mrpc", "data.tsak: unknown key; did you mean 'task'"),
        ("stages.2.name=x", "expected an index below 2, found '2'"),
        ("stages.last.name=x", "expected an index below 2, found 'last'"),
        ("seed.x=1", "expected a field that holds others, found 'seed"),
        ("name=[", "expected a YAML value"),
        ("quantization.bitz=2-2-8", "stages.0.quantization.bitz: unknown key; did you mean 'bits'"),
    ],
)
def test_wrong_overrides_are_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_yaml(write(tmp_path, minimal(seed=1)), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "top level: expected a mapping, found 'NoneType'"),
        ("- a", "top level: expected a mapping, found 'list'"),
        ("name: [", "expected a readable YAML recipe"),
        ("name: a\nname: b", "key 'name' given twice"),
        ("data: {task: sst2, task: mrpc}", "key 'task' given twice"),
        ("name: !!python/object/apply:os.getcwd []", "expected a readable YAML recipe"),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        Recipe.from_yaml(path)
    assert str(path) in str(error.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml: expected a recipe file, found none"):
        Recipe.from_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match="expected a readable YAML recipe"):
        Recipe.from_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="binary.yaml: expected a readable YAML recipe"):
        Recipe.from_yaml(tmp_path / "binary.yaml")


STAGES = [
    {"name": "first", "training": {"num_train_epochs": 1}},
    {"name": "second", "init": "previous", "training": {"num_train_epochs": 2}},
    {"name": "third", "init": "previous", "start": "first", "teacher": "first", "training": {"num_train_epochs": 4}},
]


def test_a_schedule_is_the_recipe_with_these_stages_only(tmp_path):
    path = write(tmp_path, minimal(stages=STAGES))
    recipe = Recipe.from_yaml(path, ["schedule=[second, first]"])
    second = {"name": "second", "training": {"num_train_epochs": 2}}  # it comes first: it starts from the teacher
    assert recipe == Recipe.from_dict(minimal(stages=[second, STAGES[0]]))
    assert recipe.schedule == () and Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_yaml(path, ["schedule=[first, third]"]).stages[1].start == "first"
    whole = Recipe.from_yaml(path)
    assert Recipe.from_yaml(path, ["schedule=[first, second, third]"]).fingerprint() == whole.fingerprint()
    short = Recipe.from_yaml(path, ["schedule=[second, first]", "last_stage=second"])
    assert [stage.name for stage in short.stages] == ["second"]


@pytest.mark.parametrize(
    ("total", "schedule", "steps"),
    [
        (7, [], [1, 2, 4]),
        (100, [], [14, 29, 57]),
        (100, ["second"], [100]),
        (10, ["first", "third"], [2, 8]),
    ],
)
def test_stages_share_the_steps_by_their_epochs(tmp_path, total, schedule, steps):
    recipe = Recipe.from_yaml(write(tmp_path, minimal(stages=STAGES, schedule=schedule, total_steps=total)))
    assert [stage.training for stage in recipe.stages] == [{"max_steps": count} for count in steps]
    assert sum(steps) == total and recipe.total_steps is None
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_old_recipes_keep_their_fingerprint():
    """What recipes gained since is left out where it is unset."""
    values = Recipe.from_dict(minimal()).portable()
    assert not {"schedule", "total_steps"} & values.keys()
    assert not {"start", "without_dropout"} & values["stages"][0].keys()
    assert Recipe.from_dict(minimal(stages=STAGES)).portable()["stages"][2]["start"] == "first"


def test_fingerprint_ignores_where_things_lie_and_how_numbers_are_written():
    base = Recipe.from_dict(MINIMAL)
    moved = minimal(data={"task": "sst2", "path": "/elsewhere"}, teacher={"model": "/home/me/models/teacher/"})
    moved["stages"][0]["training"] = {"num_train_epochs": 3.0, "learning_rate": 0.00002}
    moved = Recipe.from_dict(moved)
    assert moved.fingerprint() == base.fingerprint() and len(base.fingerprint()) == 64
    assert "elsewhere" not in json.dumps(moved.portable()) and "home" not in json.dumps(moved.portable())
    assert moved != base


@pytest.mark.parametrize(
    "override",
    ["seed=1", "name=b", "teacher.model=some/other", "teacher.seed=1", "data.max_length=64", "packing=dense",
     "quantization.bits=2-2-4", "targets.logits=0.5", "stages.0.training.learning_rate=1e-5", "data.train_split=x",
     "without_dropout=true"],
)  # fmt: skip
def test_fingerprint_sees_what_changes_the_result(tmp_path, override):
    path = write(tmp_path, MINIMAL)
    assert Recipe.from_yaml(path, [override]).fingerprint() != Recipe.from_yaml(path).fingerprint()


def test_training_arguments_take_what_the_recipe_accepts(tmp_path):
    from transformers import TrainingArguments

    values = {
        "learning_rate": "2e-5",
        "warmup_steps": 0.1,
        "eval_strategy": "no",
        "optim": "adamw_torch",
        "use_cpu": True,
    }
    stage = Stage(training=values)
    arguments = TrainingArguments(output_dir=str(tmp_path), seed=1, **stage.training)
    assert arguments.learning_rate == 2e-5 and arguments.warmup_steps == 0.1


def test_quantization_fields_are_those_of_the_config():
    modeling_qbert = pytest.importorskip("modeling_qbert")
    config = modeling_qbert.TernaryBertConfig()
    spec = QuantizationSpec()
    assert spec.fields() == {name: getattr(config, name) for name in spec.fields()}
    for name, hint in typing.get_type_hints(QuantizationSpec).items():
        for choice in typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ():
            fields = {name: choice, "bits": "1-1-8"}
            assert getattr(modeling_qbert.BinaryBertConfig(**fields), name) == choice
