"""Damaged, forged and mismatched packed checkpoints: the same logits or one clear error, never a wrong answer."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from math import prod

import pytest
import torch
from damage import CONFIG, WEIGHTS, check
from tiny import latent, read_parts, sign, write_parts
from transformers import AutoModelForSequenceClassification

from modeling_qbert import CheckpointError, verify_checkpoint


# Damage to bytes: (bytes, position of the data, random) -> bytes


def flip_data(raw, data, rng):
    raw = bytearray(raw)
    raw[rng.randrange(data, len(raw))] ^= 1 << rng.randrange(8)
    return raw


def flip_header(raw, data, rng):
    raw = bytearray(raw)
    raw[rng.randrange(8, data)] ^= 1 << rng.randrange(8)
    return raw


def flip_length(raw, data, rng):  # noqa: ARG001
    raw = bytearray(raw)
    raw[rng.randrange(8)] ^= 1 << rng.randrange(8)
    return raw


def truncate(raw, data, rng):
    return raw[: rng.choice([0, 1, 7, 8, rng.randrange(8, data), data, rng.randrange(data, len(raw)), len(raw) - 1])]


def append(raw, data, rng):  # noqa: ARG001
    return raw + rng.randbytes(rng.choice([1, 8, 4096]))


def zero_page(raw, data, rng):
    size = rng.choice([64, 512, 4096])
    start = rng.randrange(data, len(raw) - 64)
    end = min(start + size, len(raw))
    return raw[:start] + bytes(end - start) + raw[end:]


def swap_pages(raw, data, rng):
    size = 64
    one, two = sorted(rng.sample(range(data, len(raw) - size, size), 2))
    return raw[:one] + raw[two : two + size] + raw[one + size : two] + raw[one : one + size] + raw[two + size :]


def drop_bytes(raw, data, rng):
    start = rng.randrange(data, len(raw) - 9)
    return raw[:start] + raw[start + rng.randrange(1, 9) :]


def noise(raw, data, rng):  # noqa: ARG001
    return rng.randbytes(rng.choice([8, 100, 5000]))


DAMAGE = {
    flip_data: 40,
    flip_header: 60,
    flip_length: 10,
    truncate: 24,
    append: 6,
    zero_page: 20,
    swap_pages: 12,
    drop_bytes: 6,
    noise: 4,
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_bytes(good, damage, tmp_path):
    rng = random.Random(damage.__name__)
    errors = 0
    for trial in range(DAMAGE[damage]):
        source, logits = good[trial % len(good)]
        folder = tmp_path / str(trial)
        shutil.copytree(source, folder)
        raw = (folder / WEIGHTS).read_bytes()
        damaged = bytes(damage(raw, 8 + int.from_bytes(raw[:8], "little"), rng))
        (folder / WEIGHTS).write_bytes(damaged)
        must_fail = (WEIGHTS,) if damaged != raw and damage is not flip_header else ()
        errors += check(folder, logits, must_fail, f"{damage.__name__} {trial}") == "error"
    assert errors > DAMAGE[damage] / 2


# Forged files: (header, data as bytearray, name of a tensor, random) -> texts of the error. Digests are recomputed, so
# that it is the check of the value that finds them.


def kind_of(header, kind):
    """Names of the tensors of a kind."""
    names = [name for name in header if name != "__metadata__"]
    if kind == "codes":
        return [name for name in names if header[name]["dtype"] == "U8"]
    if kind == "scale":
        return [name for name in names if name.endswith(("weight_scale", "_quantizer.step"))]
    floats = [name for name in names if header[name]["dtype"] == "F32"]
    return [name for name in floats if not name.endswith(("weight_scale", "_quantizer.step"))]


def put(entry, data, values, rng):
    """Overwrite one value of a float tensor."""
    begin, end = entry["data_offsets"]
    at = rng.randrange(begin, end, 4)
    data[at : at + 4] = torch.tensor(rng.choice(values), dtype=torch.float32).numpy().tobytes()


def bad_scale(header, data, name, rng):
    put(header[name], data, [float("nan"), float("inf"), float("-inf"), 0.0, -0.1, 1e30, 1e-40], rng)
    return [name]


def bad_float(header, data, name, rng):
    put(header[name], data, [float("nan"), float("inf"), float("-inf")], rng)
    return [name, "NaN or infinite"]


def bad_code(header, data, name, rng):
    begin, end = header[name]["data_offsets"]
    columns = header[name]["shape"][-1]
    at = rng.randrange(begin, end)
    if columns in (5, 7):  # every binary code is one; 36 and 50 columns of 1 bit leave pads in a row's last byte
        at += columns - 1 - (at - begin) % columns
    data[at] = 128 if columns in (37, 51) else 255  # 36 and 50 columns of 8 bits, and a pad
    return [name, f"row {(at - begin) // columns}, column"]


def bad_pad(header, data, name, rng):
    """Something in the unused places of a row's last byte: 50 columns in 13 bytes of 4, 36 columns in 8 bytes of 5."""
    begin, end = header[name]["data_offsets"]
    columns = header[name]["shape"][-1]
    if columns not in (13, 8):
        return bad_code(header, data, name, rng)
    row = rng.randrange(header[name]["shape"][0])
    data[begin + row * columns + columns - 1] = 0b01_00_00_00 if columns == 13 else 242
    return [name, f"row {row}, column {51 if columns == 13 else 36}"]


def other_shape(header, data, name, rng):  # noqa: ARG001
    shape = header[name]["shape"]
    choices = [shape[::-1], [1, *shape], [prod(shape)] if len(shape) > 1 else [*shape, 1]]
    header[name]["shape"] = rng.choice([choice for choice in choices if choice != shape])
    return [name, "shape"]


def other_dtype(header, data, name, rng):  # noqa: ARG001
    dtype = header[name]["dtype"]
    if dtype == "U8":
        header[name]["dtype"] = rng.choice(["I8", "BOOL", "F8_E4M3"])
        return [name, "dtype"]
    header[name]["dtype"] = rng.choice(["I32", "U32"])
    return [name, "dtype"]


def narrow(header, data, name, rng):
    """A float tensor stored with 16 bits."""
    begin, end = header[name]["data_offsets"]
    dtype, label = rng.choice([(torch.float16, "F16"), (torch.bfloat16, "BF16")])
    values = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.float32).to(dtype)
    data[begin:end] = values.view(torch.uint8).numpy().tobytes()
    header[name]["dtype"] = label
    shift = (end - begin) // 2
    for entry in (entry for key, entry in header.items() if key != "__metadata__"):
        entry["data_offsets"] = [at - shift if at >= end else at for at in entry["data_offsets"]]
    return [name] if name.endswith((".step", "scale")) else ["one dtype"]


def remove(header, data, name, rng):  # noqa: ARG001
    begin, end = header.pop(name)["data_offsets"]
    del data[begin:end]
    for entry in (entry for key, entry in header.items() if key != "__metadata__"):
        entry["data_offsets"] = [at - (end - begin) if at >= end else at for at in entry["data_offsets"]]
    return [name, "missing"]


def add(header, data, name, rng):  # noqa: ARG001
    header["bert.extra.weight"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    data.extend(bytes(4))
    return ["bert.extra.weight", "unexpected"]


def add_empty(header, data, name, rng):  # noqa: ARG001
    header["bert.extra.weight"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    return ["bert.extra.weight", "unexpected"]


def rename(header, data, name, rng):  # noqa: ARG001
    header[name + "s"] = header.pop(name)
    return [name, name + "s"]


def prefix(header, data, name, rng):  # noqa: ARG001
    wrapper = rng.choice(["module.", "_orig_mod."])
    for key in [key for key in header if key != "__metadata__"]:
        header[wrapper + key] = header.pop(key)
    return ["unwrapped", wrapper]


FORGERIES = {
    bad_scale: ("scale", 20),
    bad_float: ("float", 12),
    bad_code: ("codes", 20),
    bad_pad: ("codes", 12),
    other_shape: ("codes scale", 14),
    other_dtype: ("codes scale float", 12),
    narrow: ("scale float", 8),
    remove: ("codes scale float", 18),
    add: ("codes", 2),
    add_empty: ("codes", 2),
    rename: ("codes scale float", 6),
    prefix: ("codes", 2),
}


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
def test_forged_values(good, forge, tmp_path):
    rng = random.Random(forge.__name__)
    kinds, trials = FORGERIES[forge]
    for trial in range(trials):
        source, logits = good[trial % len(good)]
        folder = tmp_path / str(trial)
        shutil.copytree(source, folder)
        header, data = read_parts(folder / WEIGHTS)
        name = rng.choice(kind_of(header, kinds.split()[trial % len(kinds.split())]))
        data = bytearray(data)
        texts = forge(header, data, name, rng)
        write_parts(folder / WEIGHTS, sign(header, bytes(data)), bytes(data))
        check(folder, logits, [WEIGHTS, *texts], f"{forge.__name__} {trial} {name}")


def test_count_of_random_corruptions():
    assert sum(DAMAGE.values()) + sum(trials for _, trials in FORGERIES.values()) >= 300


def test_signing_a_sound_file_changes_nothing(good, tmp_path):
    """Or the forgeries above would be found by the digests and not by the checks they are meant for."""
    for number, (source, logits) in enumerate(good):
        shutil.copytree(source, tmp_path / str(number))
        header, data = read_parts(source / WEIGHTS)
        write_parts(tmp_path / str(number) / WEIGHTS, sign(header, data), data)
        assert check(tmp_path / str(number), logits, None) == "same"
        verify_checkpoint(tmp_path / str(number))


# Other headers


def edited(good, tmp_path, change, number=0):
    """Folder whose header went through `change`; and the logits of the sound one."""
    source, logits = good[number]
    folder = tmp_path / "edited"
    shutil.copytree(source, folder)
    header, data = read_parts(folder / WEIGHTS)
    changed = change(header)
    write_parts(folder / WEIGHTS, header if changed is None else changed, data)
    return folder, logits


def test_swapped_offsets(good, tmp_path):
    def swap(header):
        one, two = (header[f"bert.encoder.layer.0.attention.self.{name}.weight"] for name in ("query", "key"))
        one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]

    check(*edited(good, tmp_path, swap), [".weight", "SHA-256"])


@pytest.mark.parametrize("key, value, text", [
    ("qbert_format_version", "1", "format version '1'"),
    ("qbert_format_version", "0", "format version '0'"),
    ("qbert_format_version", None, "qbert_format_version"),
    ("qbert_packing", "3bit", "packing '3bit'"),
    ("qbert_packing", "dense", "packing is 'dense', config.json says '2bit'"),
    ("qbert_packing", None, "qbert_packing"),
    ("qbert_sha256", "", "'qbert_sha256' must hold 32 bytes for each of"),
    ("qbert_sha256", "AAAAA" * 9, "'qbert_sha256' must hold 32 bytes for each of"),
    ("qbert_sha256", "[]", "'qbert_sha256' is not base85"),
    ("qbert_sha256", "\u00e9" * 100_000, "'qbert_sha256' is not base85"),
    ("qbert_sha256", None, "qbert_sha256"),
    ("qbert_config", "null", "qbert_config"),
    ("qbert_config", "{}", "config field"),
    ("qbert_config", None, "qbert_config"),
    ("qbert_architecture", "TernaryBertModel", "TernaryBertModel"),
    ("qbert_architecture", None, "qbert_architecture"),
])  # fmt: skip
def test_metadata(good, key, value, text, tmp_path):
    def change(header):
        header["__metadata__"].pop(key)
        header["__metadata__"].update({} if value is None else {key: value})

    check(*edited(good, tmp_path, change), [WEIGHTS, text])


def test_headers_that_are_no_headers(good, tmp_path):
    header, _ = read_parts(good[0][0] / WEIGHTS)
    name, text = "classifier.bias", json.dumps(header)
    entry = json.dumps(header[name])
    for number, broken in enumerate(
        [
            f'{text[:-1]}, "{name}": {entry}}}',  # the same key twice, with the same value
            json.dumps({key: value for key, value in header.items() if key != "__metadata__"}),
            json.dumps({**header, "__metadata__": {"format": "pt", "other": 1}}),
            json.dumps({**header, name: {**header[name], "data_offsets": [4, 12]}}),  # overlap
            json.dumps({**header, name: {**header[name], "shape": [-2]}}),
            json.dumps({**header, name: {**header[name], "shape": [2**62, 2**62]}}),
            json.dumps({**header, name: {**header[name], "shape": [True, 2]}}),
            json.dumps({**header, name: {**header[name], "more": 1}}),
            json.dumps({**header, name: None}),
            "[]",
            "null",
            "",
            "{",
            "[" * 100_000,
            "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        folder, logits = edited(good, folder, lambda _, broken=broken: broken)
        check(folder, logits, [WEIGHTS], broken[:80])


@pytest.mark.parametrize("length", [2**62, 2**64 - 1, 100_000_001, 50_000_000])
def test_huge_headers(good, length, tmp_path):
    source, logits = good[0]
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    with open(tmp_path / WEIGHTS, "wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(60_000_000)  # sparse
    check(tmp_path, logits, [WEIGHTS, "header"])


# Other files in the folder


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["QBERT_BOMB"],)


@pytest.mark.parametrize("with_dtype", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", WEIGHTS])
def test_pickle_is_never_opened(good, name, with_dtype, tmp_path, monkeypatch):
    source, logits = good[0]
    folder = tmp_path / "folder"
    shutil.copytree(source, folder)
    (folder / WEIGHTS).unlink()
    monkeypatch.setenv("QBERT_BOMB", str(tmp_path / "exploded"))
    torch.save({"classifier.bias": Bomb()}, folder / name)
    if not with_dtype:
        fields = json.loads((folder / CONFIG).read_text())
        del fields["dtype"]
        (folder / CONFIG).write_text(json.dumps(fields))
    unpickled = []
    monkeypatch.setattr(pickle, "Unpickler", lambda *args, **kwargs: unpickled.append((args, kwargs)))
    check(folder, logits, [WEIGHTS])
    assert not unpickled and not (tmp_path / "exploded").exists()


STALE = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]


@pytest.mark.parametrize("stale", STALE)
def test_weights_beside_the_weights(good, stale, tmp_path):
    source, logits = good[0]
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    (tmp_path / stale).write_bytes(b"{}")
    check(tmp_path, logits, [stale])
    model = latent().pack()
    with pytest.raises(CheckpointError, match=stale):
        model.save_pretrained(tmp_path)
    (tmp_path / stale).unlink()
    (tmp_path / "training_args.bin").write_bytes(b"")  # the Trainer's, no weights
    check(tmp_path, logits, None)
    model.save_pretrained(tmp_path)


def test_index_instead_of_the_file(good, tmp_path):
    source, logits = good[0]
    folder = tmp_path / "folder"
    shutil.copytree(source, folder)
    shutil.move(folder / WEIGHTS, tmp_path / "outside.safetensors")
    header, _ = read_parts(tmp_path / "outside.safetensors")
    weight_map = dict.fromkeys((name for name in header if name != "__metadata__"), "../outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    check(folder, logits, ["model.safetensors.index.json"])


def test_weights_of_another_model(good, tmp_path):
    for number, fields in enumerate([{"hidden_act": "relu"}, {"weight_granularity": "per_tensor"}, {"num_labels": 3}]):
        source, logits = good[0]
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        other = latent(seed=9, **{"vocab_size": 101, "weight_granularity": "per_row", **fields}).pack()
        other.save_pretrained(tmp_path / f"other{number}")
        shutil.copy(tmp_path / f"other{number}" / WEIGHTS, folder)
        check(folder, logits, [WEIGHTS])


# After loading


CHANGES = """
import os, sys, torch, modeling_qbert
from transformers import AutoModelForSequenceClassification

torch.set_num_threads(1)
ids = torch.arange(3, 14).view(1, -1)
for change in ("truncate", "overwrite", "delete", "replace"):
    folder = os.path.join(sys.argv[1], change)
    path = os.path.join(folder, "model.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    noise = os.urandom(os.path.getsize(path))
    if change == "truncate":
        os.truncate(path, 0)
    elif change == "delete":
        os.remove(path)
    else:
        target = path if change == "overwrite" else path + ".new"
        with open(target, "r+b" if change == "overwrite" else "wb") as file:
            file.write(noise)
        os.replace(target, path)
    with torch.no_grad():
        print(change, model(ids).logits.double().tolist())
"""


def test_the_file_may_change_after_loading(good, tmp_path):
    """In a process of its own: reading a truncated memory map would end it with SIGBUS."""
    source, _ = good[0]
    for change in ("truncate", "overwrite", "delete", "replace"):
        shutil.copytree(source, tmp_path / change)
    run = subprocess.run([sys.executable, "-c", CHANGES, tmp_path], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    model = AutoModelForSequenceClassification.from_pretrained(source)
    with torch.no_grad():
        expected = model(torch.arange(3, 14).view(1, -1)).logits.double().tolist()
    answers_after = [line.split(" ", 1) for line in run.stdout.splitlines()]
    assert [change for change, _ in answers_after] == ["truncate", "overwrite", "delete", "replace"]
    assert all(json.loads(logits) == expected for _, logits in answers_after)
