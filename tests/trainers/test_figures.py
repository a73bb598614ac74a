"""Figures: what is drawn, and what is left out."""

import sys

import pytest
from test_results import make_results, write_results

from trainers import cli, figures
from trainers.figures import plot_results, plot_sizes, plot_training


def log_history(steps=20):
    history = []
    for step in range(10, 10 * steps + 1, 10):
        history.append({"loss": 3.0 / step, "loss_logits": 1.0 / step, "loss_hidden_states": 2 / step, "step": step})
        if step % 50 == 0:
            history.append({"eval_loss": 1.0, "eval_accuracy": 0.5 + step / 1000, "eval_runtime": 2.0, "step": step})
    return [*history, {"train_runtime": 5.0, "train_loss": 1.0, "step": steps * 10}]


def test_curves_are_the_terms_and_the_scores_only():
    losses, scores = figures._curves(log_history())
    assert set(losses) == {"loss", "loss logits", "loss hidden states"} and set(scores) == {"accuracy"}
    assert scores["accuracy"][50] == pytest.approx(55.0) and len(losses["loss"]) == 20


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_one_panel_per_task_and_no_empty_ones(monkeypatch):
    from matplotlib.figure import Figure

    figure = Figure()
    monkeypatch.setattr(figures, "save_figure", lambda draw, _size, _path: draw(figure))
    plot_results([make_results(task) for task in ("rte", "sst2", "mrpc", "other")], "unused.png")
    assert [axis.get_title().splitlines()[0] for axis in figure.axes] == ["SST-2", "MRPC", "RTE", "other"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["teacher", "twn"]


def drawn(figure):
    """Name -> (size, score) of the points of `plot_sizes`."""
    (axis,) = figure.axes
    points = [tuple(line.get_xydata()[0]) for line in axis.lines if len(line.get_xydata()) == 1]
    notes = {tuple(note.xy): note.get_text() for note in axis.texts}
    assert len(notes) == len(points)
    return {notes[point]: point for point in points}


def test_sizes_are_means_of_the_tasks_that_all_variants_have(monkeypatch):
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(figures, "save_figure", lambda draw, _size, _path: (seen.append(Figure()), draw(seen[-1])))
    whole = [make_results(task, "whole", packed=score) for task, score in (("sst2", 0.9), ("mrpc", 0.7))]
    runs = [*whole, make_results("sst2", "part", packed=0.6, recipe={"family": "binary", "stages": [{}]})]
    plot_sizes(runs, "unused.png")
    points = drawn(seen[-1])
    assert points.keys() == {"teacher", "whole", "part"}
    assert points["whole"] == pytest.approx((6.1, 90.0)) and points["part"] == pytest.approx((6.1, 60.0))
    assert seen[-1].get_supxlabel() == "tasks common to all variants; not MRPC"
    assert seen[-1].axes[0].get_ylabel() == "mean of SST-2, x 100"
    assert [text.get_text() for text in seen[-1].axes[0].get_legend().get_texts()] == ["binary", "ternary"]
    plot_sizes(runs, "unused.png", tasks=["sst2", "mrpc"])
    points = drawn(seen[-1])
    assert points.keys() == {"teacher", "whole"} and points["whole"] == pytest.approx((6.1, 80.0))
    assert points["teacher"] == pytest.approx((90.9, 91.0))
    assert seen[-1].get_supxlabel() == "without those that lack one of these tasks: part"
    assert seen[-1].axes[0].get_ylabel() == "mean of SST-2, MRPC, x 100"
    plot_sizes(whole, "unused.png")
    assert not seen[-1].get_supxlabel() and seen[-1].axes[0].get_legend() is None
    apart = [make_results("sst2", "one"), make_results("mrpc", "two")]
    with pytest.raises(ValueError, match=r"common to all variants.*--tasks \(one: SST-2; two: MRPC\)"):
        plot_sizes(apart, "unused.png")
    with pytest.raises(ValueError, match="no variant has all of"):
        plot_sizes(apart, "unused.png", tasks=["sst2", "mrpc"])
    with pytest.raises(ValueError, match=r"tasks: expected some of \['sst2'\], found \['rte'\]"):
        plot_sizes(whole[:1], "unused.png", tasks=["sst2", "rte"])


def test_a_teacher_is_a_mean_of_its_own_and_needs_the_tasks_too(monkeypatch):
    from matplotlib.figure import Figure

    figure = Figure()
    monkeypatch.setattr(figures, "save_figure", lambda draw, _size, _path: draw(figure))
    runs = [make_results(task, "small", teacher=score) for task, score in (("sst2", 0.9), ("mrpc", 0.8))]
    other = [
        make_results(task, "large", teacher=score, packed=0.8) for task, score in (("sst2", 0.95), ("mrpc", 0.85))
    ]
    third = [make_results("sst2", "small", 43, teacher=0.5)]
    for run, model in (*zip(other, "bb"), *zip(third, "c")):
        run["teacher"] |= {"model": model, "bytes": 400_000_000}
    plot_sizes([*runs, *other, *third], "unused.png")
    points = drawn(figure)
    assert points["teacher minilm"] == pytest.approx((90.9, 85.0))
    assert points["teacher b"] == pytest.approx((400.0, 90.0))
    assert "teacher c" not in points


@pytest.mark.parametrize("lowest", (80.1, 20), ids=("over-all", "at-the-top"))
def test_names_of_near_points_do_not_stand_on_each_other(lowest):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    renderer = FigureCanvasAgg(figure).get_renderer()
    axis = figure.subplots()
    points = [(f"progressive-w{index}a8", 3.3, 80 + 0.05 * index, "C0", "o") for index in range(12)]
    points += [("far-with-a-name-that-needs-room", 90, lowest, "black", "D"), ("beside", 3.7, 80.2, "C1", "o")]
    for _, size, score, colour, marker in points:
        axis.plot([size], [score], marker, color=colour)
    axis.set_xscale("log")
    axis.margins(x=0.25, y=0.15)
    figures._label_points(axis, points, figure.get_size_inches())
    figure.canvas.draw()
    boxes = {note.get_text(): Text.get_window_extent(note, renderer) for note in axis.texts}
    assert len(boxes) == 14
    for name, box in boxes.items():
        assert [other for other, its in boxes.items() if box.overlaps(its)] == [name]
        assert axis.bbox.x0 - 1 <= box.x0 and box.x1 <= axis.bbox.x1 + 1
        assert axis.bbox.y0 - 1 <= box.y0 and box.y1 <= axis.bbox.y1 + 1


def test_work_is_drawn_and_widths_are_joined(monkeypatch):
    from matplotlib.figure import Figure

    figure = Figure()
    monkeypatch.setattr(figures, "save_figure", lambda draw, _size, _path: draw(figure))
    runs = [
        make_results("sst2", f"{name}-{width}", packed=score, multiply_adds={"backbone": width * 1e8, "ghosts": extra})
        for name, extra, scores in (("ghost", 2e6, (0.8, 0.86)), ("pruned", 0, (0.7, 0.85)))
        for width, score in zip((0.25, 0.5), scores)
    ]
    plot_sizes(runs, "unused.png", "multiply_adds")
    (axis,) = figure.axes
    assert [note.get_text() for note in axis.texts] == ["pruned-0.25", "ghost-0.25", "pruned-0.5", "ghost-0.5"]
    lines = [line.get_xydata().flatten().tolist() for line in axis.lines if line.get_linestyle() == "-"]
    assert lines == [pytest.approx([27, 80, 52, 86]), pytest.approx([25, 70, 50, 85])]
    for run, distance in zip(runs, (0.4, 0.2, 0.5, 0.3)):
        run["packed"] = {**run["packed"], "teacher_distance": distance}
    figure.clear()
    plot_sizes(runs, "unused.png", "multiply_adds", distances=True)
    (axis,) = figure.axes
    lines = [line.get_xydata().flatten().tolist() for line in axis.lines if line.get_linestyle() == "-"]
    assert lines == [pytest.approx([27, 0.4, 52, 0.2]), pytest.approx([25, 0.5, 50, 0.3])]
    with pytest.raises(ValueError, match="lack the field 'packed.teacher_distance'"):
        plot_sizes([make_results()], "unused.png", distances=True)
    with pytest.raises(ValueError, match="lack the field 'multiply_adds'"):
        plot_sizes([make_results()], "unused.png", "multiply_adds")


def test_figures_are_png_and_leave_the_backend_alone(tmp_path):
    runs = [make_results(task, "a $\\x_", seed) for task in ("sst2", "mrpc", "rte") for seed in (1, 2)]
    plot_results(runs, tmp_path / "scores.png")
    wide, high = png_size(tmp_path / "scores.png")
    assert wide > high > 300
    plot_results(runs[:1], tmp_path / "one.png")
    assert png_size(tmp_path / "one.png")[0] < wide
    plot_training(log_history(), tmp_path / "training.png")
    both = png_size(tmp_path / "training.png")[1]
    plot_training([{"loss": 1.0, "step": 1}], tmp_path / "loss.png")
    assert png_size(tmp_path / "loss.png")[1] < both
    with pytest.raises(ValueError, match="log history"):
        plot_training([], tmp_path / "none.png")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_one_figure_of_several_sweeps_from_the_command_line(tmp_path, capsys):
    """Folders that share a variant's name, and tasks that one of them lacks."""
    for sweep, tasks in (("one", ("sst2", "mrpc")), ("two", ("sst2",))):
        for task in tasks:
            run = make_results(task, fingerprint=f"{sweep}-{task}")
            write_results(tmp_path / sweep / f"{run['run']}.json", run)
    command = ["table", str(tmp_path / "one"), str(tmp_path / "two"), "--size-figure", str(tmp_path / "sizes.png")]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "| one/twn |" in shown and "| two/twn |" in shown
    assert png_size(tmp_path / "sizes.png")[0] > 1000
    assert cli.main([*command, "--tasks", "mrpc"]) == 0
    assert cli.main([*command, "--tasks", "rte"]) == 2
    assert "tasks: expected some of" in capsys.readouterr().err
