"""The benchmark's bookkeeping: order, agreement, rivals that are missing, cells that are merged, tables."""

import copy
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from trainers import bench, bench_report, rivals


ROOT = Path(__file__).parents[2]


def test_candidates_take_turns_and_ratios_are_medians():
    calls = []

    def call(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    times = bench.interleaved({"a": lambda: call("a", 0.002), "b": lambda: call("b", 0.004)}, rounds=3, seconds=0)
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert [len(values) for values in times.values()] == [3, 3]
    assert bench.ratio({"a": [1, 9, 2], "b": [1, 3, 1]}, "a", "b") == 2


def test_no_speed_without_agreement(monkeypatch):
    expected = np.random.default_rng(0).standard_normal((4, 16))
    assert bench.check_rival("same", expected + 0.01, expected) > 0.99
    with pytest.raises(bench.DisagreementError, match="other: logits correlate"):
        bench.check_rival("other", expected[::-1].copy(), expected)
    with pytest.raises(bench.DisagreementError, match="NaN"):
        bench.check_rival("NaN", expected * np.nan, expected)
    monkeypatch.setitem(bench.NETWORKS, "tiny", {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64})
    monkeypatch.setattr(bench, "SAME_PATH", -1.0)
    model = bench.OURS["W2A8"](bench.NETWORKS["tiny"] | {"num_attention_heads": 4, "vocab_size": 50}).eval().pack()
    with pytest.raises(bench.DisagreementError, match="layer-by-layer"):
        bench.check_own_path("W2A8", model, rivals.example(50, 1, 4))


@pytest.fixture
def tiny(monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 4}
    monkeypatch.setitem(bench.NETWORKS, "tiny", sizes | {"vocab_size": 50})
    monkeypatch.setattr(bench, "BLOCK_SECONDS", 0.0)


def test_a_cell_names_what_is_missing(tiny, tmp_path, monkeypatch):  # noqa: ARG001
    absent = rivals.Rival(("no_such_package",), rivals.prepare_fp32)
    monkeypatch.setitem(rivals.RIVALS, "ONNX Runtime int8", absent)
    names = ("PyTorch fp32", "torch dynamic int8", "ONNX Runtime int8")
    cell = bench.measure("tiny", 1, [(1, 4)], tmp_path, ours=("W2A8", "W1A1"), rivals=names, rounds=1)["1x4"]
    assert set(cell["ms"]) == {"PyTorch fp32", "torch dynamic int8", "W2A8", "W1A1"}
    assert "no_such_package not installed" in cell["missing"]["ONNX Runtime int8"]
    assert cell["best_rival"] is None and not cell["ratio"] and cell["commit"]
    report = bench.merge(tmp_path / "r.json", "speed", "tiny", 1, {"1x4": cell})
    report = bench.merge(tmp_path / "r.json", "speed", "tiny", 2, {"1x4": cell})
    assert json.loads((tmp_path / "r.json").read_text()) == report
    assert set(report["speed"]["tiny"]) == {"1 thread", "2 threads"}
    text = bench_report.render(report)
    assert "no_such_package not installed" in text and text.count("| W1A1 |") == 2


def test_a_measurement_of_memory_is_replaced_whole(tmp_path):
    """What another machine had, and this one lacks, does not stay beside its numbers."""
    bench.merge(
        tmp_path / "r.json", "memory", "tiny", 1, {"packed": [1, 2, 3], "OpenVINO int8": [4, 5, 6], "cpu": "a"}
    )
    report = bench.merge(tmp_path / "r.json", "memory", "tiny", 1, {"packed": [7, 8, 9], "cpu": "b"})
    assert report["memory"]["tiny"]["1 thread"] == {"packed": [7, 8, 9], "cpu": "b"}


def test_rivals_are_kept_by_weights_not_by_name(tiny, tmp_path):  # noqa: ARG001
    model = bench.prepare_ours(["W2A8"], "tiny", tmp_path)["W2A8"]
    before = bench._digest(model)
    assert bench._digest(copy.deepcopy(model)) == before
    model.bert.encoder.layer[0].output.LayerNorm.bias.data.add_(1)
    assert bench._digest(model) != before


def test_prepared_networks_are_kept(tiny, tmp_path):  # noqa: ARG001
    first, again = (bench.prepare_ours(["W1A8"], "tiny", tmp_path)["W1A8"] for _ in range(2))
    given = rivals.example(50, 2, 5)
    with torch.no_grad():
        assert torch.equal(first(**given).logits, again(**given).logits)


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_tables_are_rendered_from_the_results(name):
    text = (ROOT / name).read_text()
    assert "<!-- qbert bench" in text
    assert bench_report.update_text(text, ROOT) == text, f"render them again: qbert bench --update {name}"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fma avx2", True), ("avx2 avx512_vnni", False), ("avx2 avx_vnni", False), ("asimddp", False)],
)
def test_which_cpus_saturate(tmp_path, monkeypatch, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"model name\t: Some CPU\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(rivals, "Path", lambda _: tmp_path / "cpuinfo")
    assert rivals.saturates() == expected


def test_floors_belong_to_the_cpu_that_was_probed():
    report = json.loads((ROOT / "benchmarks/results/bench.json").read_text())
    assert "x floor)" in bench_report.render(report, ["speed"])
    shape = (next(iter(report["speed"])), "W2A8", 1, 128, 1)
    assert bench_report.floor_ms("AMD EPYC (family 25, model 17)", *shape) == bench_report.floor_ms("AMD EPYC", *shape)
    for by_threads in report["speed"].values():
        for cells in by_threads.values():
            for cell in cells.values():
                cell["cpu"] = "another"
    assert "x floor)" not in bench_report.render(report, ["speed"])


def test_the_figure_shows_every_ratio(monkeypatch, tmp_path):
    figure = Figure()
    monkeypatch.setattr(bench_report, "save_figure", lambda draw, _size, _path: draw(figure))
    report = json.loads((ROOT / "benchmarks/results/bench.json").read_text())
    bench_report.plot(report, tmp_path / "bench.png")
    assert [axis.get_title() for axis in figure.axes] == [
        f"{name}, {n}" for name, by in report["speed"].items() for n in by
    ]
    for axis in figure.axes:
        low, high = axis.get_ylim()
        shown = [y for line in axis.get_lines() for y in line.get_ydata()]
        assert low == 0 and 0 < min(shown) and max(shown) < high
