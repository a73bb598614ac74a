import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainers import sweep as module
from trainers.recipe import Recipe
from trainers.results import load_results, read_results
from trainers.sweep import collect, load_sweep, run_sweep
from trainers.tables import render_table


ROOT = Path(__file__).parents[2]
DIGEST = "0123456789abcdef" * 4


def make_results(recipe):
    rows = {"rows": 872, "sha256": DIGEST}
    return {
        "schema": 1,
        "run": recipe.name,
        "recipe": recipe.portable(),
        "fingerprint": recipe.fingerprint(),
        "multiply_adds": {"backbone": 5},
        "seed": recipe.seed,
        "task": recipe.data.task,
        "split": "validation",
        "rows": 872,
        "main_metric": "accuracy",
        "teacher": {"model": "teacher", "metrics": {"accuracy": 0.91}, "seed": 42, "bytes": 90_900_000},
        "student": {"metrics": {"accuracy": 0.9}},
        "packed": {"metrics": {"accuracy": 0.9}, "bytes": 1, "sha256": DIGEST, "max_logit_difference": 0.0},
        "data": {"train": rows, "validation": rows},
        "stages": [{"name": "distil", "steps": 10, "seconds": 1.5, "final_losses": {}}],
        "versions": {"torch": "2.13.0"},
        "commit": None,
        "device": "cpu, 1 threads",
        "seconds": 4.0,
        "note": "beyond the schema",
    }


def execute(recipe, folder):
    (folder / "ran").open("a").write("x")
    return make_results(recipe)


def execute_or_fail(recipe, folder):
    print("a line of the run")
    quantizer = recipe.stages[0].quantization.weight_quantizer
    if quantizer == "lat" and recipe.seed == 2:
        raise RuntimeError("diverged")
    if quantizer == "lat" and recipe.seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return execute(recipe, folder)


@pytest.fixture
def sweep_file(tmp_path):
    """Writes sweep.yaml beside recipes/base.yaml; keyword arguments replace fields of the sweep, None removes."""
    recipe = {
        "name": "base",
        "data": {"task": "sst2"},
        "teacher": {"model": "/somewhere/teacher"},
        "stages": [{"training": {"num_train_epochs": 3}}],
    }
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "base.yaml").write_text(yaml.safe_dump(recipe))

    def write(**fields):
        values = {
            "name": "tiny",
            "recipe": "recipes/base.yaml",
            "tasks": ["sst2", "mrpc"],
            "seeds": {"sst2": [1], "mrpc": [1, 2]},
            "runs": {"twn": None, "lat": ["quantization.weight_quantizer=lat"]},
            **fields,
        }
        path = tmp_path / "sweep.yaml"
        values = {key: value for key, value in values.items() if value is not None}
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def names(runs):
    return [run.name for run in runs]


def test_expansion_puts_every_first_seed_before_any_second(sweep_file):
    sweep = load_sweep(sweep_file())
    assert sweep.name == "tiny"
    assert names(sweep.runs) == [
        "sst2/twn/seed1",
        "sst2/lat/seed1",
        "mrpc/twn/seed1",
        "mrpc/lat/seed1",
        "mrpc/twn/seed2",
        "mrpc/lat/seed2",
    ]
    last = sweep.runs[-1]
    assert last.path == Path("mrpc/lat/seed2") and isinstance(last.recipe, Recipe)
    assert (last.recipe.data.task, last.recipe.seed) == ("mrpc", 2)
    assert last.recipe.stages[0].quantization.weight_quantizer == "lat"


def test_without_tasks_and_seeds_the_recipes_own_are_used(sweep_file):
    assert names(load_sweep(sweep_file(tasks=None, seeds=None)).runs) == ["sst2/twn/seed42", "sst2/lat/seed42"]


def test_overrides_as_mapping_win_over_the_tasks_overrides(sweep_file):
    path = sweep_file(
        task_overrides={"mrpc": {"data": {"max_length": 64}, "stages.0.training.num_train_epochs": 5}},
        runs={
            "a": {"stages.0.training.learning_rate": 1e-05, "quantization": {"bits": "2-8-8"}, "data.text_pair": None},
            "b": ["stages.0.training.num_train_epochs=7"],
        },
        seeds=[1],
    )
    recipes = {run.name: run.recipe for run in load_sweep(path, data_path="/data: #x").runs}
    a, b = recipes["mrpc/a/seed1"], recipes["mrpc/b/seed1"]
    assert (a.data.max_length, recipes["sst2/a/seed1"].data.max_length) == (64, 128)
    assert (a.stages[0].training["num_train_epochs"], b.stages[0].training["num_train_epochs"]) == (5, 7)
    assert a.stages[0].training["learning_rate"] == 1e-05 and a.stages[0].quantization.bits == "2-8-8"
    assert {recipe.data.path for recipe in recipes.values()} == {"/data: #x"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"taks": ["sst2"]}, "taks.*tasks"),
        ({"name": None}, "name"),
        ({"name": "../x"}, "name.*'../x'"),
        ({"recipe": "recipes/none.yaml"}, "none.yaml"),
        ({"runs": {}}, "runs.*at least one"),
        ({"runs": {"a/b": None}}, "runs.*'a/b'"),
        ({"runs": {"seed1": None}}, "runs.*'seed1'"),
        ({"runs": {"sst2": None}}, "different names.*sst2"),
        ({"runs": {"twn": "quantization.bits=2-2-8"}}, r"runs\.twn.*list"),
        ({"runs": {"twn": ["quantisation.bits=2-2-8"]}}, r"runs\.twn.*quantisation"),
        ({"runs": {"twn": ["seed=3"]}}, r"runs\.twn.*seed.*`seeds`"),
        ({"runs": {"twn": {"data": {"task": "rte"}}}}, r"runs\.twn.*data\.task.*`tasks`"),
        ({"runs": {"a": None, "b": ["quantization.weight_quantizer=twn"]}}, "sst2/a/seed1.*sst2/b/seed1.*same recipe"),
        ({"tasks": []}, "tasks.*at least one"),
        ({"tasks": ["sst2", "sst2"]}, "different"),
        ({"seeds": {"sst2": [1]}}, "seeds.*mrpc"),
        ({"seeds": {"sst2": [1], "mrpc": [1], "rte": [1]}}, r"seeds\.rte"),
        ({"seeds": []}, "seeds.*integers"),
        ({"seeds": [1, 1]}, "seeds.*different"),
        ({"seeds": ["1"]}, "seeds.*integers"),
        ({"task_overrides": {"rte": []}}, r"task_overrides\.rte"),
    ],
)
def test_errors_name_the_file_and_the_field(sweep_file, fields, message):
    path = sweep_file(**fields)
    with pytest.raises(ValueError, match=f"(?s)sweep.yaml.*{message}"):
        load_sweep(path)


def test_a_run_given_twice_and_a_missing_file_are_errors(sweep_file, tmp_path):
    path = sweep_file()
    path.write_text(path.read_text() + "name: again\n")
    with pytest.raises(ValueError, match="sweep.yaml.*twice"):
        load_sweep(path)
    with pytest.raises(ValueError, match="absent.yaml"):
        load_sweep(tmp_path / "absent.yaml")


def test_finished_runs_are_skipped_the_second_time(sweep_file, tmp_path, capsys):
    path = sweep_file()
    first = run_sweep(path, tmp_path / "out", execute=execute)
    assert first.finished == names(load_sweep(path).runs) and first.exit_code == 0
    saved = read_results(tmp_path / "out" / "tiny" / "mrpc" / "lat" / "seed2" / "results.json")
    assert saved["run"] == "mrpc/lat/seed2" and saved["fingerprint"] == load_sweep(path).runs[-1].recipe.fingerprint()
    printed = capsys.readouterr().out
    assert "[2/6] sst2/lat/seed1: accuracy 90.00, teacher 91.00, drop 1.00" in printed and "ETA" in printed

    second = run_sweep(path, tmp_path / "out", execute=execute, data_path="elsewhere")
    assert second.skipped == first.finished and not second.finished
    assert (tmp_path / "out" / "tiny" / "sst2" / "twn" / "seed1" / "ran").read_text() == "x"


def test_only_selects_runs_and_must_match(sweep_file, tmp_path):
    path = sweep_file()
    outcome = run_sweep(path, tmp_path, execute=execute, only=["mrpc/*/seed2", "sst2/lat/*"])
    assert outcome.finished == ["sst2/lat/seed1", "mrpc/twn/seed2", "mrpc/lat/seed2"]
    with pytest.raises(ValueError, match=r"only.*'rte/\*'"):
        run_sweep(path, tmp_path, execute=execute, only=["rte/*"])


def test_results_of_another_recipe_stop_the_sweep_and_tell_what_differs(sweep_file, tmp_path):
    run_sweep(sweep_file(), tmp_path / "out", execute=execute, only=["sst2/twn/*"])
    path = sweep_file(task_overrides={"sst2": ["stages.0.training.num_train_epochs=4"]})
    with pytest.raises(ValueError, match=r"(?s)results\.json.*num_train_epochs is 3(\.0)?, now 4(\.0)?") as error:
        run_sweep(path, tmp_path / "out", execute=execute)
    assert "sst2/lat" not in str(error.value) and "data.path" not in str(error.value)
    assert not (tmp_path / "out" / "tiny" / "mrpc").exists()


def test_results_from_before_a_new_recipe_field_still_count(sweep_file, tmp_path):
    path = sweep_file()
    run_sweep(path, tmp_path / "out", execute=execute, only=["sst2/twn/*"])
    file = tmp_path / "out" / "tiny" / "sst2" / "twn" / "seed1" / "results.json"
    results = json.loads(file.read_text())
    del results["recipe"]["stages"][0]["temperature"]
    results["fingerprint"] = "as it was then"
    file.write_text(json.dumps(results))
    assert run_sweep(path, tmp_path / "out", execute=execute, only=["sst2/twn/*"]).skipped == ["sst2/twn/seed1"]


def test_a_broken_results_file_stops_the_sweep(sweep_file, tmp_path):
    file = tmp_path / "tiny" / "sst2" / "twn" / "seed1" / "results.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(ValueError, match="results.json"):
        run_sweep(sweep_file(), tmp_path, execute=execute)


def test_a_failing_run_is_logged_and_the_rest_goes_on(sweep_file, tmp_path, capsys):
    path = sweep_file()
    outcome = run_sweep(path, tmp_path, execute=execute_or_fail)
    assert list(outcome.failed) == ["mrpc/lat/seed2"] and len(outcome.finished) == 5 and outcome.exit_code == 1
    log = outcome.failed["mrpc/lat/seed2"]
    assert "RuntimeError: diverged" in log.read_text() and str(log) in capsys.readouterr().out
    # retried the next time
    assert run_sweep(path, tmp_path, execute=execute).finished == ["mrpc/lat/seed2"]


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"rows": 0}])
def test_a_runner_that_returns_wrong_results_is_a_failed_run(sweep_file, tmp_path, change):
    def wrong(recipe, folder):
        del folder
        other = Recipe.from_dict({**recipe.to_dict(), "seed": 99})
        return {**make_results(other), **change}

    outcome = run_sweep(sweep_file(), tmp_path, execute=wrong, only=["sst2/twn/*"])
    assert outcome.exit_code == 1 and not list(tmp_path.rglob("results.json"))


def test_an_interrupt_ends_the_sweep(sweep_file, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep_file(), tmp_path, execute=interrupt)


def test_a_runner_killed_before_the_sweep_named_its_results_is_finished(sweep_file, tmp_path):
    path = sweep_file()
    run = load_sweep(path).runs[0]
    file = tmp_path / "tiny" / run.path / "results.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(make_results(run.recipe)))
    assert run_sweep(path, tmp_path, execute=execute, only=["sst2/twn/*"]).skipped == ["sst2/twn/seed1"]
    assert read_results(file)["run"] == "sst2/twn/seed1"


def test_jobs_run_in_processes_and_a_killed_one_is_a_failed_run(sweep_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
    path = sweep_file(tasks=["sst2"], seeds=[1, 3], runs={"lat": ["quantization.weight_quantizer=lat"]})
    outcome = run_sweep(path, tmp_path, execute=execute_or_fail, jobs=2)
    assert outcome.finished == ["sst2/lat/seed1"] and list(outcome.failed) == ["sst2/lat/seed3"]
    assert "a line of the run" in (tmp_path / "tiny" / "sst2" / "lat" / "seed1.log").read_text()
    assert "ended with -9" in outcome.failed["sst2/lat/seed3"].read_text()
    with pytest.raises(ValueError, match="jobs"):
        run_sweep(path, tmp_path, execute=execute, jobs=0)


def test_a_run_finished_by_another_process_meanwhile_is_not_repeated(sweep_file, tmp_path):
    path = sweep_file()

    def execute_all_the_others(recipe, folder):
        (tmp_path / "nested").touch()
        run_sweep(path, tmp_path, execute=execute, only=["mrpc/*"])
        return execute(recipe, folder)

    outcome = run_sweep(path, tmp_path, execute=execute_all_the_others, only=["sst2/twn/*", "mrpc/*"])
    assert outcome.finished == ["sst2/twn/seed1"] and len(outcome.skipped) == 4
    assert (tmp_path / "tiny" / "mrpc" / "twn" / "seed1" / "ran").read_text() == "x"


def test_another_machine_continues_from_the_committed_results_alone(sweep_file, tmp_path):
    path, committed = sweep_file(), tmp_path / "results"
    run_sweep(path, tmp_path / "out", execute=execute, only=["*/seed1"])
    beside_weights = tmp_path / "out" / "tiny" / "sst2" / "twn" / "seed1" / "packed" / "results.json"
    beside_weights.parent.mkdir()
    beside_weights.write_text(json.dumps(make_results(load_sweep(path).runs[0].recipe)))
    written = collect(tmp_path / "out" / "tiny", committed)
    assert [file.relative_to(committed).as_posix() for file in written] == [
        "tiny/mrpc/lat/seed1.json",
        "tiny/mrpc/twn/seed1.json",
        "tiny/sst2/lat/seed1.json",
        "tiny/sst2/twn/seed1.json",
    ]
    assert "note" not in read_results(written[0]) and read_results(written[0])["multiply_adds"] == {"backbone": 5}
    assert collect(tmp_path / "out" / "tiny", committed) == []

    outcome = run_sweep(path, tmp_path / "other machine", execute=execute, results=committed)
    assert outcome.finished == ["mrpc/twn/seed2", "mrpc/lat/seed2"] and len(outcome.skipped) == 4
    assert len(collect(tmp_path / "other machine" / "tiny", committed)) == 2
    assert "(seeds 2)" in render_table(load_results([committed / "tiny"]))


def test_augmented_runs_are_collected_again(sweep_file, tmp_path):
    path = sweep_file(runs={"augmented": ["data.augmented=somewhere", "augmented=true"]})
    for seed, count in ((1, 2), (2, 1)):
        outcome = run_sweep(path, tmp_path / "out", execute=execute, only=[f"*/seed{seed}"])
        assert len(outcome.finished) == count and not outcome.failed
        assert len(collect(tmp_path / "out" / "tiny", tmp_path / "results")) == count
    (file, *_) = (tmp_path / "results").rglob("seed1.json")
    values = json.loads(file.read_text())
    assert "augmented" not in values["recipe"]["data"] and values["recipe"]["stages"][0]["augmented"]
    assert Recipe.from_portable(values["recipe"]).fingerprint() == values["fingerprint"]
    del values["recipe"]["stages"][0]["random_parts"]  # as a result from before the recipe had that field
    file.write_text(json.dumps(values | {"fingerprint": "of then"}))
    assert len(run_sweep(path, tmp_path / "new", execute=execute, results=tmp_path / "results").skipped) == 3


def test_collected_results_of_another_recipe_are_never_overwritten(sweep_file, tmp_path):
    run_sweep(sweep_file(), tmp_path / "out", execute=execute, only=["sst2/twn/*"])
    (file,) = collect(tmp_path / "out" / "tiny", tmp_path / "results")
    before = file.read_bytes()
    changed = sweep_file(task_overrides={"sst2": {"data.max_length": 32}})
    with pytest.raises(ValueError, match="seed1.json.*data.max_length is 128, now 32"):
        run_sweep(changed, tmp_path / "new", execute=execute, results=tmp_path / "results")
    run_sweep(changed, tmp_path / "new", execute=execute, only=["sst2/twn/*"])
    with pytest.raises(ValueError, match="seed1.json.*data.max_length is 128, now 32"):
        collect(tmp_path / "new" / "tiny", tmp_path / "results")
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match="absent"):
        collect(tmp_path / "absent", tmp_path / "results")


OTHER = """
import sys, time
sys.path.insert(0, sys.argv[3])
import test_sweep
from trainers.sweep import run_sweep

def execute(recipe, folder):
    if recipe.data.task == "mrpc":
        print("in a run", flush=True)
        time.sleep(60)
    return test_sweep.execute(recipe, folder)

run_sweep(sys.argv[1], sys.argv[2], execute=execute)
"""


def test_two_processes_share_a_sweep_and_it_continues_after_kill_9(sweep_file, tmp_path, capsys):
    path = sweep_file()
    command = [sys.executable, "-c", OTHER, str(path), str(tmp_path / "out"), str(Path(__file__).parent)]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert any(line.strip() == "in a run" for line in other.stdout)  # the lines end when the process dies
        beside = run_sweep(path, tmp_path / "out", execute=execute)
        assert beside.skipped == ["sst2/twn/seed1", "sst2/lat/seed1"] and beside.locked == ["mrpc/twn/seed1"]
        assert len(beside.finished) == 3 and beside.exit_code == 0
        assert "mrpc/twn/seed1: skipped: another process is running it" in capsys.readouterr().out
        assert run_sweep(path, tmp_path / "out", execute=execute).locked == ["mrpc/twn/seed1"]
    finally:
        other.kill()
        other.wait()
    assert run_sweep(path, tmp_path / "out", execute=execute).finished == ["mrpc/twn/seed1"]


def test_eta_weighs_runs_by_their_task(sweep_file):
    runs = {run.name: run for run in load_sweep(sweep_file()).runs}
    clock = module._Clock(jobs=2)
    assert clock.eta(list(runs.values())) == ""
    clock.add(runs["sst2/twn/seed1"], 600)
    clock.add(runs["mrpc/twn/seed1"], 60)
    clock.add(runs["mrpc/lat/seed1"], 120)
    assert clock.eta([runs["sst2/lat/seed1"], runs["mrpc/twn/seed2"], runs["mrpc/lat/seed2"]]) == ", ETA 6 min"
    assert clock.eta([runs["sst2/lat/seed1"]]) == ", ETA 10 min" and clock.eta([]) == ""


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (80, "80 s"), (300, "5 min"), (7260, "2 h 01 min")])
def test_duration(seconds, text):
    assert module._duration(seconds) == text
