"""Which run compares with which paper, and its drop."""

from pathlib import Path

import pytest
from test_results import make_results

from trainers.published import METHODS, PUBLISHED, published_drop, published_method
from trainers.sweep import load_sweep
from trainers.tables import render_table


SWEEPS = Path(__file__).parents[2] / "examples" / "sweeps"


@pytest.mark.parametrize(
    "task, quantizer, drop",
    [
        ("sst2", "twn", 0.3),
        ("sst2", "lat", 0.6),
        ("cola", "twn", 2.4),
        ("cola", "lat", 3.8),
        ("mrpc", "twn", -1.0),
        ("stsb", "twn", 1.8),
        ("stsb", "lat", 1.85),
        ("rte", "lat", -1.1),
        ("rotten_tomatoes", "twn", None),
        ("sst2", "binary", None),
    ],
)
def test_published_drop(task, quantizer, drop):
    assert published_drop(make_results(task=task, quantizer=quantizer)) == drop


def test_published_drop_needs_the_published_bits_and_the_last_stage():
    results = make_results()
    results["recipe"]["stages"].append({"quantization": {"bits": "8-8-8", "weight_quantizer": "twn"}})
    assert published_drop(results) is None


@pytest.mark.parametrize(
    "stages, drop",
    [
        ([{"init": "pruned"}, {"init": "split", "quantization": {"bits": "1-1-8", "planes": 2}}], 59.7 - 53.4),
        ([{"init": "pruned"}, {"init": "split", "quantization": {"bits": "1-1-4", "planes": 2}}], 59.7 - 44.4),
        ([{"init": "teacher", "quantization": {"bits": "1-1-8", "planes": 1}}], 59.7 - 46.7),
        ([{"init": "teacher", "quantization": {"bits": "1-1-4"}}], 59.7 - 34.8),
        # Nothing of that kind is published: half width without the split, some modules split, other bits.
        ([{"init": "pruned"}, {"quantization": {"bits": "2-2-8", "weight_quantizer": "twn"}}], None),
        ([{"init": "pruned"}, {"quantization": {"bits": "1-1-8"}}], None),
        *(
            ([{"init": "pruned", key: 3.5}, {"init": "split", "quantization": {"bits": "1-1-8", "planes": 2}}], None)
            for key in ("split_megabytes", "split_multiply_adds")
        ),
        ([{"quantization": {"bits": "1-1-1"}}], None),
    ],
)
def test_published_drop_of_binary_networks(stages, drop):
    found = published_drop(make_results(task="cola", recipe={"stages": stages}))
    assert found == (None if drop is None else pytest.approx(drop, abs=0.01))


def test_published_rows_are_complete():
    for (method, bits), rows in PUBLISHED.items():
        full = METHODS[method][1]
        assert bits.count("-") == 2 and len(full) == 10
        for row in rows:
            assert row is None or (len(row) == 10 and all(score is None or 10 < score < 95 for score in row))


CENTERED = {"bits": "1-1-1", "binary_quantizer": "centered"}
CHAIN = [
    {"name": "w1a2", "init": "teacher", "quantization": CENTERED | {"bits": "1-1-2"}},
    {"name": "last", "init": "previous", "teacher": "w1a2", "quantization": CENTERED},
]


@pytest.mark.parametrize(
    ("stages", "method", "drop", "augmented"),
    [
        ([{"quantization": CENTERED}], "BiT", 59.7 - 25.1, 59.7 - 32.0),
        ([{"quantization": CENTERED | {"bits": "1-1-2"}}], "BiT", 59.7 - 32.1, 59.7 - 43.2),
        ([{"quantization": CENTERED | {"bits": "1-1-4"}}], "BiT", 59.7 - 42.0, None),
        (CHAIN, "BiT chain", 59.7 - 32.9, 59.7 - 38.2),
        ([{"quantization": CENTERED | {"weight_granularity": "per_row"}}], "BiBERT", 59.7 - 25.4, 59.7 - 37.8),
        ([{"quantization": {"bits": "1-1-8"}}], "plain", 59.7 - 46.7, 59.7 - 54.2),
        # No tables are known: random parts, bits that go down, a start from W1A2 without imitating it.
        ([{"init": "random_encoder", "quantization": CENTERED}], None, None, None),
        ([CHAIN[0] | {"init": "random_encoder"}, CHAIN[1]], None, None, None),
        ([{"quantization": {"bits": "1-1-32"}}, {"quantization": {"bits": "1-1-8"}}], None, None, None),
        ([{"quantization": {"bits": "4-4-32"}}, {"quantization": {"bits": "2-2-8"}}], None, None, None),
        ([CHAIN[0], {"init": "previous", "quantization": CENTERED}], None, None, None),
    ],
)
def test_one_bit_activations_are_bits_and_unknown_tables_are_not_quoted(stages, method, drop, augmented):
    recipe = {"family": "binary", "stages": stages}
    assert published_method(make_results(recipe=recipe)) == method
    for rows, expected in ((False, drop), (True, augmented)):
        last = [{**stage, "augmented": rows} for stage in stages]
        found = published_drop(make_results(task="cola", recipe=recipe | {"stages": last}))
        assert found == (None if expected is None else pytest.approx(expected, abs=0.005))
    if method == "BiT":
        assert published_drop(make_results(task="mrpc", recipe=recipe)) is None  # of an unknown metric
    ghost = make_results(task="cola", recipe=recipe | {"family": "ghost"})
    assert published_drop(ghost) is None


# Sweep -> variant -> method, as `published_method` sees the recipe that is run.
@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        (
            "binarybert-glue",
            {"plain-w1a8": "plain", "split-w1a8": "split", "plain-w1a4": "plain", "split-w1a4": "split"},
        ),
        ("progressive-glue", {"progressive-w1a8": None, "direct-w1a8": "plain", "direct-w2a8": "TWN"}),
        (
            "random-init",
            {"pretrained-w1a1": "BiT", "chain-w1a1": "BiT chain", "random-encoder-w1a1": None},
        ),
    ],
)  # fmt: skip
def test_shipped_sweeps_compare_with_their_papers(sweep, expected):
    runs = {run.name: run.recipe for run in load_sweep(SWEEPS / f"{sweep}.yaml").runs}
    for variant, method in expected.items():
        recipe = runs[f"mrpc/{variant}/seed42"].portable()
        assert published_method(make_results(recipe=recipe)) == method, variant


def test_the_table_says_whose_drop_it_shows():
    chain = make_results("cola", "chain", recipe={"stages": CHAIN})
    other = make_results("cola", "random", recipe={"stages": [{"init": "random_encoder", "quantization": CENTERED}]})
    (note,) = [line for line in render_table([chain, make_results("cola"), other]).splitlines() if "Paper:" in line]
    assert "BiT (Liu et al., NeurIPS 2022), multi-distilled for chain; TernaryBERT (" in note and ") for twn; " in note
    assert "random" not in note and "paper 26.80" in render_table([chain])
    assert "Paper: no drop is known to us for networks made like these." in render_table([other])
