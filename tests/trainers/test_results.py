import copy
import json
import subprocess

import pytest

from trainers import cli, tables
from trainers import results as module
from trainers.published import published_drop
from trainers.results import environment, load_results, read_results, variant_of, write_atomic, write_results
from trainers.tables import escape_markdown, render_differences, render_distances, render_table, update_tables


DIGEST = "0123456789abcdef" * 4


def make_results(task="sst2", variant="twn", seed=42, teacher=0.91, packed=0.90, quantizer="twn", **changes):
    results = {
        "schema": 1,
        "run": f"{task}/{variant}/seed{seed}",
        "recipe": {"stages": [{"quantization": {"bits": "2-2-8", "weight_quantizer": quantizer}}]},
        "fingerprint": f"{task}-{variant}-{seed}",
        "seed": seed,
        "task": task,
        "split": "validation",
        "rows": 872,
        "main_metric": "accuracy",
        "teacher": {"model": "minilm", "metrics": {"accuracy": teacher}, "seed": 42, "bytes": 90_900_000},
        "student": {"metrics": {"accuracy": packed}},
        "packed": {
            "metrics": {"accuracy": packed},
            "bytes": 6_100_000,
            "sha256": DIGEST,
            "max_logit_difference": 0.0,
        },
        "data": {"train": {"rows": 67349, "sha256": DIGEST}, "validation": {"rows": 872, "sha256": DIGEST}},
        "stages": [{"name": "distil", "steps": 10, "seconds": 1.5, "final_losses": {"loss_logits": 0.25}}],
        "versions": {"torch": "2.13.0"},
        "commit": "f" * 40,
        "device": "cpu, 2 threads",
        "seconds": 4.0,
    }
    return {**results, **changes}


def replaced(results, field, value):
    """Copy with the dotted field set, or removed when the value is `...`."""
    results = copy.deepcopy(results)
    *path, last = field.split(".")
    node = results
    for key in path:
        node = node[int(key) if isinstance(node, list) else key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return results


def row(table, title):
    """Cells of the row with that title, without the title."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_write_then_read_gives_the_same(tmp_path):
    results = make_results()
    write_results(tmp_path / "a" / "results.json", results)
    assert read_results(tmp_path / "a" / "results.json") == results
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["results.json"]


def test_fields_beyond_the_schema_are_kept_and_task_and_commit_may_be_null(tmp_path):
    results = make_results(commit=None, note="x")
    results["task"] = None
    write_results(tmp_path / "r.json", results)
    assert read_results(tmp_path / "r.json") == results


@pytest.mark.parametrize(
    "field", [*module.FIELDS, "teacher.bytes", "packed.sha256", "data.train.rows", "data.validation"]
)
def test_a_missing_field_is_named_with_its_file(tmp_path, field):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(replaced(make_results(), field, ...)))
    with pytest.raises(ValueError) as error:
        read_results(path)
    assert str(path) in str(error.value) and repr(field) in str(error.value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("schema", 2),
        ("schema", "1"),
        ("rows", 0),
        ("rows", True),
        ("seed", "42"),
        ("seed", 42.0),
        ("run", ""),
        ("teacher", []),
        ("teacher.metrics.accuracy", float("inf")),
        ("student.metrics.accuracy", float("nan")),
        ("packed.metrics.accuracy", "0.9"),
        ("packed.metrics.accuracy", None),
        ("packed.sha256", DIGEST.upper()),
        ("stages", []),
        ("stages.0.seconds", None),
        ("stages.0.final_losses.loss_logits", float("nan")),
        ("versions.torch", 2),
    ],
)
def test_a_bad_value_is_named_and_not_written(tmp_path, field, value):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError) as error:
        write_results(path, replaced(make_results(), field, value))
    assert str(path) in str(error.value) and field in str(error.value)
    assert not path.exists()


def test_main_metric_must_be_there_in_every_part():
    for part in ("teacher", "student", "packed"):
        with pytest.raises(ValueError, match=f"{part}.metrics.accuracy"):
            module.validate_results(replaced(make_results(), f"{part}.metrics", {"f1": 0.5}), "x.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": NaN}', '{"seconds": -Infinity}', "[" * 100_000, "\xff"])
def test_other_content_is_an_error_with_the_file(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="other.json"):
        read_results(path)


def test_a_number_too_large_for_a_float_is_not_finite(tmp_path):
    path = tmp_path / "big.json"
    path.write_text(json.dumps(make_results()).replace('"accuracy": 0.9}', '"accuracy": 1e999}'))
    with pytest.raises(ValueError, match="student.metrics.accuracy.*finite"):
        read_results(path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, step, fail)
    with pytest.raises(OSError):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_load_reads_results_json_below_a_folder_else_every_json(tmp_path):
    write_results(tmp_path / "run" / "a" / "results.json", make_results())
    (tmp_path / "run" / "a" / "config.json").write_text("{}")
    write_results(tmp_path / "run" / "a" / "packed" / "results.json", make_results(variant="as-the-recipe-calls-it"))
    write_results(tmp_path / "committed" / "sst2" / "seed43.json", make_results(seed=43))
    loaded = load_results([tmp_path / "run", tmp_path / "committed"])
    assert [run["seed"] for run in loaded] == [42, 43]


def test_load_takes_a_copy_once_and_refuses_a_contradiction(tmp_path):
    write_results(tmp_path / "a.json", make_results())
    write_results(tmp_path / "b.json", make_results(seconds=9.0))
    write_results(tmp_path / "c.json", make_results(packed=0.5))
    assert len(load_results([tmp_path / "a.json", tmp_path / "b.json"])) == 1
    with pytest.raises(ValueError, match="c.json.*a.json"):
        load_results([tmp_path / "a.json", tmp_path / "c.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        load_results([tmp_path / "empty"])


def test_variants_of_one_name_are_told_apart_by_their_sweeps(tmp_path):
    def write(folder, sweep, variant, seed, name="seed{}.json"):
        run = make_results(variant=variant, seed=seed, fingerprint=f"{sweep}-{variant}-{seed}")
        write_results(tmp_path / folder / sweep / "sst2" / variant / name.format(seed), run)

    write("results", "one", "twn", 42)
    write("results", "one", "alone", 42)
    write("results", "two", "twn", 43)
    write("runs", "two", "twn", 44, "seed{}/results.json")
    runs = load_results([tmp_path / "results", tmp_path / "runs"])
    assert {(variant_of(run), run["seed"]) for run in runs} == {
        ("one/twn", 42), ("alone", 42), ("two/twn", 43), ("two/twn", 44),
    }  # fmt: skip
    # One sweep alone, also from several places, keeps its names.
    folders = [tmp_path / "runs", tmp_path / "results" / "two" / "sst2"]
    assert {variant_of(run) for run in load_results(folders)} == {"twn"}
    # What both sweeps hold is one run, and the same seed in both is no contradiction.
    write("results", "two", "twn", 42)
    assert len(load_results([tmp_path / "results"])) == 4
    shared = tmp_path / "results" / "one" / "sst2" / "alone" / "seed42.json"
    write_results(tmp_path / "results" / "two" / "sst2" / "alone" / "seed42.json", read_results(shared))
    assert [variant_of(run) for run in load_results([tmp_path / "results"])].count("alone") == 1


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def test_commit_is_the_projects_own_and_says_dirty(tmp_path):
    assert module._git_commit(tmp_path) is None
    git(tmp_path, "init")
    assert module._git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    commit = module._git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "run.json").write_text("{}")
    assert module._git_commit(tmp_path) == commit
    (tmp_path / "new").write_text("1")
    assert module._git_commit(tmp_path) == f"{commit}-dirty"
    # installed in a folder of somebody else's checkout
    assert module._git_commit(tmp_path / "results") is None


def test_environment_fits_the_schema():
    module.validate_results(make_results(**environment()), "environment")
    assert set(environment()) == {"versions", "device", "commit"}
    assert {"torch", "transformers", "qbert-zoo"} <= set(environment()["versions"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a | b", r"a \| b"),
        ("<script>&", "&lt;script&gt;&amp;"),
        ("{{ x }}{%", "&#123;&#123; x &#125;&#125;&#123;%"),
        ("a\n---\nb\u2028c\x00", "a --- b c"),
        ("--- a", r"\--- a"),
        ("12. a", r"12\. a"),
        ("3.5", r"3\.5"),
        ("per_row _x_", r"per_row \_x\_"),
        ("[a](b)", r"\[a\](b)"),
        ("`\\", r"\`\\"),
        ("# a", r"\# a"),
    ],
)
def test_escape_markdown(text, expected):
    assert escape_markdown(text) == expected


def test_variant_is_the_name_without_task_and_seed():
    assert variant_of(make_results(variant="twn")) == "twn"
    assert variant_of(make_results(run="plain")) == "plain"
    assert variant_of(make_results(run="sst2/seed42")) == "sst2/seed42"


def test_table_has_mean_spread_seeds_and_drop_against_the_own_teacher():
    results = [
        make_results(seed=42, teacher=0.91, packed=0.90),
        make_results(seed=43, teacher=0.92, packed=0.90),
        make_results(seed=44, teacher=0.93, packed=0.93),
        make_results(task="mrpc", teacher=0.85, packed=0.865),
    ]
    for run, seed in zip(results, (42, 43, 44, 42), strict=True):
        run["teacher"]["seed"] = seed
    table = render_table(results[::-1])
    assert row(table, "") == ["SST-2 (accuracy)", "MRPC (accuracy)", "mean"]
    assert row(table, "teacher") == ["92.00 ± 1.00 (trainings 3)", "85.00 (trainings 1)", "88.50"]
    assert row(table, "twn") == ["91.00 ± 1.73 (seeds 3)", "86.50 (seeds 1)", "88.75"]
    # MRPC gains 1.5 where the paper gains 1.0: not over
    assert row(table, "twn: drop") == [
        "1.00 ± 1.00 (seeds 3), paper 0.30, **0.70 over**",
        "-1.50 (seeds 1), paper -1.00",
        "-0.25, paper -0.35, **0.10 over**",
    ]
    assert "Seeds: 42, 43, 44." in table and "fffffff" in table and "SST-2 validation (872 rows)" in table


def test_distances_to_the_teacher_have_a_table():
    runs = [make_results(seed=42), make_results(seed=43), make_results("mrpc"), make_results(variant="lat")]
    for run, distance in zip(runs, (0.25, 0.35, 0.5)):
        run["packed"] = {**run["packed"], "teacher_distance": distance}
    table = render_distances(runs)
    assert row(table, "") == ["SST-2", "MRPC"] and "lat" not in table  # which has none
    assert row(table, "twn") == ["0.3000 ± 0.0707 (seeds 2)", "0.5000 (seeds 1)"]


def test_the_mean_has_a_spread_over_the_seeds_that_all_tasks_have():
    runs = [make_results(seed=42, packed=0.90), make_results(seed=43, packed=0.80), make_results(seed=44, packed=0.85)]
    runs += [make_results("mrpc", seed=42, packed=0.70), make_results("mrpc", seed=43, packed=0.72)]
    table = render_table(runs)
    # All runs: (85 + 71) / 2; of seeds 42 and 43: 80 and 76.
    assert row(table, "twn")[-1] == "78.00 ± 2.83 (seeds 2)"
    assert row(table, "twn: drop")[-1] == "13.00 ± 2.83 (seeds 2), paper -0.35, **13.35 over**"
    assert row(render_table(runs[:-1]), "twn")[-1] == "77.50"  # only one seed in common


def test_differences_are_between_runs_of_one_task_seed_and_teacher():
    def pair(task, seed, first, second, teachers=(0.91, 0.91), distances=()):
        runs = [
            make_results(task, variant, seed, teacher, packed)
            for variant, teacher, packed in zip(("a", "b"), teachers, (first, second), strict=True)
        ]
        for run, distance in zip(runs, distances):
            run["packed"]["teacher_distance"] = distance
        return runs

    runs = [
        *pair("sst2", 42, 0.90, 0.88, distances=(0.3, 0.4)),
        *pair("sst2", 43, 0.90, 0.86, distances=(0.45, 0.5)),
        *pair("sst2", 44, 0.90, 0.10, teachers=(0.91, 0.92)),  # not comparable
        *pair("mrpc", 42, 0.70, 0.71),
        *pair("mrpc", 43, 0.70, 0.72),
        make_results("rte", "a", 42),
    ]
    table = render_differences(runs[:-1], [("a", "b"), ("b", "a")])
    assert row(table, "") == ["SST-2", "MRPC", "mean"]
    assert row(table, "a − b") == ["+3.00 ± 1.41 (pairs 2)", "-1.50 ± 0.71 (pairs 2)", "+0.75 ± 0.35 (seeds 2)"]
    assert row(table, "a − b: distance, %") == ["-17.50 ± 10.61 (pairs 2)", "–", "-17.50 ± 10.61 (seeds 2)"]
    assert row(table, "b − a")[1] == "+1.50 ± 0.71 (pairs 2)"
    assert row(render_differences(runs, [("a", "b")]), "a − b")[-2:] == ["–", "+0.75 ± 0.35 (seeds 2)"]  # RTE: no pair
    with pytest.raises(ValueError, match="expected one of a, b, found 'c'"):
        render_differences(runs, [("a", "c")])
    with pytest.raises(ValueError, match="a and b have no two runs of one task, seed and teacher"):
        render_differences(pair("sst2", 44, 0.90, 0.10, teachers=(0.91, 0.92)), [("a", "b")])


@pytest.mark.parametrize("field, name", [("recipe.packing", "recipe packing"), ("data.train.sha256", "data train")])
def test_spread_is_that_of_seeds_alone(field, name):
    other = replaced(make_results(seed=43), field, "0" * 64)
    with pytest.raises(ValueError, match=f"differ in more than their seed: {name}; show them in separate tables"):
        render_table([make_results(), other])
    render_table([make_results(), replaced(make_results(variant="other"), field, "0" * 64)])


def test_a_text_shows_differences_of_several_folders(tmp_path):
    write_results(tmp_path / "one" / "seed42.json", make_results(variant="a", packed=0.90))
    write_results(tmp_path / "two" / "seed42.json", make_results(variant="b", packed=0.88))
    text = "x\n<!-- qbert differences one+two a:b b:a -->\nold\n<!-- end -->\ny\n"
    updated = update_tables(text, tmp_path)
    assert "old" not in updated and updated.startswith("x\n<!-- qbert") and updated.endswith("<!-- end -->\ny\n")
    for wrong in ("differences one+two", "table one a:b"):
        with pytest.raises(ValueError, match="pairs FIRST:SECOND"):
            update_tables(text.replace("differences one+two a:b b:a", wrong), tmp_path)
    # Nothing is left as it was, and nothing between two blocks is taken for a block.
    for wrong in ("<!-- qbert differences one a:b c -->\nx\n<!-- end -->\n", "<!-- qbert table one -->\nprose\n"):
        with pytest.raises(ValueError, match="<!-- qbert .* one.*: expected FOLDER"):
            update_tables(wrong + text, tmp_path)
    assert row(updated, "a − b") == ["+2.00 (pairs 1)"] and row(updated, "b − a")[0] == "-2.00 (pairs 1)"


def test_the_command_shows_differences(tmp_path, capsys):
    for variant, packed in (("a", 0.90), ("b", 0.88)):
        write_results(tmp_path / f"{variant}.json", make_results(variant=variant, packed=packed))
    assert cli.main(["table", str(tmp_path), "--differences", "a:b"]) == 0
    assert row(capsys.readouterr().out, "a − b") == ["+2.00 (pairs 1)"]
    assert cli.main(["table", str(tmp_path), "--differences", "a"]) == 2
    assert "expected one of a, b, found ''" in capsys.readouterr().err


def test_a_drop_equal_to_the_papers_is_not_over():
    assert "over**" not in render_table([make_results(teacher=0.931, packed=0.928)]).split("\n\n")[0]


def test_a_gain_smaller_than_the_papers_is_over():
    table = render_table([make_results(task="rte", teacher=0.70, packed=0.71)])
    assert row(table, "twn: drop") == ["-1.00 (seeds 1), paper -1.80, **0.80 over**"]


def test_one_teacher_shared_by_runs_counts_once_and_missing_cells_are_dashes():
    results = [make_results(seed=42), make_results(seed=43), make_results(task="cola", variant="lat", quantizer="lat")]
    table = render_table(results)
    assert row(table, "teacher") == ["91.00 (trainings 1)", "91.00 (trainings 1)", "91.00"]
    assert row(table, "twn")[1:] == ["–", "–"] and row(table, "lat: drop")[0::2] == ["–", "–"]


def test_different_teachers_get_rows_of_their_own():
    other = make_results(variant="base", teacher=0.93)
    other["teacher"]["model"] = "mpnet|x"
    table = render_table([make_results(), other])
    assert row(table, "teacher minilm") == ["91.00 (trainings 1)"]
    assert r"| teacher mpnet\|x | 93.00 (trainings 1) |" in table


@pytest.mark.parametrize(
    "field, value",
    [("main_metric", "f1"), ("rows", 871), ("split", "train"), ("data.validation.sha256", DIGEST[::-1])],
)
def test_scores_that_do_not_compare_are_refused(field, value):
    other = make_results(seed=43)
    for part in ("teacher", "student", "packed"):
        other[part]["metrics"]["f1"] = 0.5
    with pytest.raises(ValueError, match="sst2/twn/seed42.*sst2/twn/seed43"):
        render_table([make_results(), replaced(other, field, value)])


def test_two_runs_of_one_name_and_no_runs_are_refused():
    with pytest.raises(ValueError, match="sst2/twn/seed42"):
        render_table([make_results(), make_results(fingerprint="other")])
    with pytest.raises(ValueError, match="no results"):
        render_table([])


# Rows as the papers' repositories print them: MNLI-m, -mm, QQP, QNLI, SST-2, CoLA, STS-B, MRPC, RTE.
PRINTED = {
    "BinaryBERT's teacher": ([84.9, 85.5, 91.4, 92.1, 93.2, 59.7, 90.1, 86.3, 72.2], 83.9, None),
    "BWN 1-1-8": ([84.2, 84.0, 91.1, 90.7, 92.3, 46.7, 86.8, 82.6, 68.6], 80.8, None),
    "TWS 1-1-8": ([84.2, 84.7, 91.2, 91.5, 92.6, 53.4, 88.6, 85.5, 72.2], 82.7, None),
    "TWS 1-1-8, augmented": ([84.2, 84.7, 91.2, 91.6, 93.2, 55.5, 89.2, 86.0, 74.0], 83.3, None),
    "BWN 1-1-4": ([83.5, 83.4, 90.9, 90.7, 92.3, 34.8, 84.9, 79.9, 65.3], 78.4, None),
    "BiT 1-1-1": ([79.5, 79.4, 85.4, 86.4, 89.9, 32.9, 72.0, 79.9, 62.1], 74.2, 73.5),
    "BiT 1-1-1, augmented": ([79.5, 79.4, 85.4, 86.5, 92.3, 38.2, 84.2, 88.0, 69.7], 78.1, 78.0),
}


@pytest.mark.parametrize("name", PRINTED)
def test_averages_are_those_that_the_papers_print(name):
    scores, nine, eight = PRINTED[name]
    found = tables.glue_averages(dict(zip(tables.GLUE_COLUMNS, scores, strict=True)))
    assert round(found[0], 1) == nine
    if eight is not None:
        assert found[1] == pytest.approx(eight, abs=0.051)
    with pytest.raises(ValueError, match="averages over GLUE: missing .*'rte', 'accuracy'"):
        tables.glue_averages(dict(zip(tables.GLUE_COLUMNS[:-1], scores)))


def test_every_metric_is_shown_and_the_averages_where_all_tasks_are_there():
    runs = []
    for (task, metric), score in zip(tables.GLUE_COLUMNS, PRINTED["BiT 1-1-1"][0], strict=True):
        if metric == "accuracy_mismatched":
            runs[-1]["packed"]["metrics"] |= {metric: score / 100}
            continue
        metrics = {metric: score / 100} | ({"f1": 0.5} if task in ("mrpc", "qqp") else {})
        run = make_results(task=task, main_metric=metric)
        run["packed"]["metrics"], run["teacher"]["metrics"] = metrics, {metric: 0.9}
        runs.append(run)
    lines = tables.render_metrics(runs).splitlines()
    both = "(accuracy / accuracy mismatched) | QQP (accuracy / f1) | MRPC (accuracy / f1)"
    assert lines[0] == f"|  | MNLI {both} | GLUE, 9 / 8 columns |"
    assert lines[2] == "| twn | 79.50 / 79.40 | 85.40 / 50.00 | 79.90 / 50.00 | 74.17 / 73.51 |"
    assert "GLUE" not in tables.render_metrics(runs[1:]).splitlines()[0]
    assert tables.render_metrics([make_results()]) == ""


def test_squad_is_measured_against_its_own_dev_split():
    run = make_results(task="squad", main_metric="f1")
    for part in ("teacher", "student", "packed"):
        run[part]["metrics"] = {"f1": 0.8 if part == "teacher" else 0.79, "exact_match": 0.7}
    assert published_drop(run) == pytest.approx(88.7 - 87.4)
    table = render_table([run])
    assert "SQuAD v1.1 (f1)" in table and "BERT-base on SQuAD dev at the same bits" in table
    assert "BERT-base on GLUE dev at the same bits" in render_table([make_results()])
