"""Publishing: one commit or none, clear texts for every fault, nothing private leaves, a rerun completes."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from stand_in import TOKEN, Fault, Hub
from tiny import inputs
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from zoo import HERE, ROOT, build

from trainers import hub as hub_module
from trainers.hub import HubError, push_to_hub
from trainers.latency import write_latency


REPO = "me/tiny-ternary"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made with the endpoint of its time
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.waits = waits
    huggingface_hub.close_session()
    yield hub
    hub.close()
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A small packed checkpoint with the tokenizer, results and card of the committed one."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build("ternary", "bert", state="packed").save_pretrained(folder)
    trained = ROOT / "model_cards" / "ternarybert-minilm-sst2"
    for name in ("tokenizer.json", "tokenizer_config.json", "results.json"):
        shutil.copyfile(trained / name, folder / name)
    results = json.loads((folder / "results.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    results["packed"] |= {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def checkpoint(template, tmp_path):
    return shutil.copytree(template, tmp_path / "checkpoint")


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_commit_holds_everything(hub, checkpoint):
    for name in ("training_args.bin", "optimizer.pt", "notes.txt", ".env", "runs/events"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"stays here")
    before = content(checkpoint)
    url = push_to_hub(checkpoint, REPO)
    assert url == f"{hub.url}/{REPO}/commit/{hub.repos[REPO][-1][0]}"
    assert len(hub.repos[REPO]) == 2 and content(checkpoint) == before  # its birth and one commit
    files = hub.files(REPO)
    assert {"config.json", "model.safetensors", "modeling_ternary.py", "tokenizer.json", "README.md"} <= set(files)
    assert {"results.json", ".eval_results/sst2.yaml"} <= set(files)
    assert not {"training_args.bin", "optimizer.pt", "notes.txt", ".env", "runs/events"} & set(files)
    assert b"stays here" not in b"".join(files.values())
    assert files["model.safetensors"] == before["model.safetensors"]
    front, body = files["README.md"].decode().split("---\n")[1:3]
    front = yaml.safe_load(front)
    assert front["base_model_relation"] == "quantized" and front["license"] == "apache-2.0"
    assert front["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert "SNLI and MultiNLI" in body.split("## Limitations")[1].split("##")[0]
    assert front["model-index"][0]["name"] == REPO
    for name in ("config.json", "model.safetensors", "modeling_ternary.py"):
        assert hashlib.sha256(files[name]).hexdigest() in body
    (entry,) = yaml.safe_load(files[".eval_results/sst2.yaml"])
    assert entry["dataset"] == {"id": "nyu-mll/glue", "task_id": "sst2"}
    assert entry["value"] == front["model-index"][0]["results"][0]["metrics"][0]["value"]


def test_latency_goes_into_the_card(hub, checkpoint):
    found = write_latency(checkpoint, lengths=(4, 9), rounds=3)
    assert [row["tokens"] for row in found["rows"]] == [4, 9] and found["threads"] == 1
    assert all(row[name] > 0 for row in found["rows"] for name in ("packed_ms", "fp32_ms"))
    push_to_hub(checkpoint, REPO)
    assert b"## Latency" in hub.files(REPO)["README.md"] and "latency.json" in hub.files(REPO)


def test_pushing_again_changes_nothing(hub, checkpoint):
    first = push_to_hub(checkpoint, REPO)
    uploads = sum("PUT" in request for request in hub.requests)
    assert push_to_hub(checkpoint, REPO) == first
    assert len(hub.repos[REPO]) == 2 and sum("PUT" in request for request in hub.requests) == uploads


def test_an_old_folder_gets_code_and_a_card_of_its_own(hub, checkpoint):
    """Saved before checkpoints carried code, with a card that speaks of another name."""
    for path in checkpoint.glob("*.py"):
        path.unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    del config["auto_map"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "README.md").write_text("# an old name")
    push_to_hub(checkpoint, REPO)
    files = hub.files(REPO)
    assert "AutoModelForMaskedLM" in json.loads(files["config.json"])["auto_map"] and "modeling_lowbit.py" in files
    assert b"an old name" not in files["README.md"] and REPO.encode() in files["README.md"]


PERMANENT = {
    401: "does not accept the token.*hf auth login",
    403: "may not write",
    404: "not found; check the name",
    409: "being changed by something else",
    412: "another commit came in between",
    413: "too large",
}
PASSING = {429: "asks for fewer requests", 500: r"fault of its own \(500\)", 503: "fault of its own", 504: "fault of"}
PLACES = ["POST /api/repos/create", "preupload", "PUT /objects", "/commit/"]


def assert_clean(text, hub):
    assert TOKEN not in text and "Bearer" not in text and "\n" not in text.strip()
    for name in hub.repos:
        assert TOKEN.encode() not in b"".join(hub.files(name).values())


@pytest.mark.parametrize("status", PERMANENT)
def test_refusals_are_final_and_clear(hub, checkpoint, status, caplog):
    if status in (409, 412):
        hub.create(REPO)
    hub.faults = [Fault("/commit/", status, times=99)]
    before = content(checkpoint)
    with caplog.at_level(logging.DEBUG), pytest.raises(HubError, match=f"{REPO}: .*{PERMANENT[status]}") as raised:
        push_to_hub(checkpoint, REPO)
    assert sum("/commit/" in request for request in hub.requests) == 1 and not hub.waits
    assert len(hub.repos[REPO]) == 1 and content(checkpoint) == before
    assert_clean(str(raised.value), hub)
    assert TOKEN not in caplog.text
    hub.faults = []
    push_to_hub(checkpoint, REPO)
    assert len(hub.repos[REPO]) == 2


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", [429, 500, 502, 503, 504, "cut"])
def test_passing_faults_are_retried(hub, checkpoint, place, kind):
    hub.faults = [Fault(place, kind, times=2)]
    push_to_hub(checkpoint, REPO)
    assert len(hub.repos[REPO]) == 2 and "model.safetensors" in hub.files(REPO)
    assert hub.waits and max(hub.waits) <= 60


@pytest.mark.parametrize("kind", [*PASSING, "cut"])
def test_lasting_faults_end_with_a_clear_text(hub, checkpoint, kind):
    hub.faults = [Fault("/commit/", kind, times=99)]
    before = content(checkpoint)
    text = PASSING.get(kind, "the connection to the Hub broke")
    with pytest.raises(HubError, match=rf"{REPO}: .*{text}.*tried 5 times") as raised:
        push_to_hub(checkpoint, REPO)
    assert_clean(str(raised.value), hub)
    assert len(hub.repos[REPO]) == 1 and content(checkpoint) == before
    hub.faults = []
    push_to_hub(checkpoint, REPO)
    assert len(hub.repos[REPO]) == 2 and set(hub.files(REPO)) > {"config.json", "model.safetensors", "README.md"}


def test_the_hub_says_how_long_to_wait(hub, checkpoint):
    hub.faults = [
        Fault("/commit/", 429, headers={"Retry-After": "17"}),
        Fault("/commit/", 429, headers={"Retry-After": "9999"}),
    ]
    push_to_hub(checkpoint, REPO)
    assert hub.waits == [17.0, 60.0]


def test_a_silent_hub_is_not_waited_for_for_ever(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(hub_module, "TIMEOUT", 0.3)
    hub.faults = [Fault("/commit/", "hang", times=99)]
    with pytest.raises(HubError, match="did not answer for 0 s.*tried 5 times"):
        push_to_hub(checkpoint, REPO)
    hub.released.set()
    assert len(hub.repos[REPO]) == 1


def test_a_lost_answer_makes_no_second_commit(hub, checkpoint):
    hub.faults = [Fault("/commit/", "lost")]
    url = push_to_hub(checkpoint, REPO)
    assert len(hub.repos[REPO]) == 2 and url.endswith(hub.repos[REPO][-1][0])


def test_another_push_in_between_is_not_overwritten(hub, checkpoint):
    hub.create(REPO)
    hub.between = {"README.md": b"somebody else's"}
    with pytest.raises(HubError, match="another commit came in between"):
        push_to_hub(checkpoint, REPO)
    assert hub.files(REPO)["README.md"] == b"somebody else's" and "config.json" not in hub.files(REPO)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_foreign_weights_are_not_left_beside_ours(hub, checkpoint, name):
    hub.create(REPO)
    hub.commit(REPO, {name: b"other"})
    with pytest.raises(HubError, match=f"holds other weights.*{name}"):
        push_to_hub(checkpoint, REPO)
    assert len(hub.repos[REPO]) == 2 and "config.json" not in hub.files(REPO)


def test_without_a_token_or_online(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(checkpoint, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        push_to_hub(checkpoint, REPO)
    with pytest.raises(HubError, match="does not accept the token") as raised:
        push_to_hub(checkpoint, REPO, token="hf_wrong" + "x" * 20)
    assert "hf_wrong" not in str(raised.value) and not hub.repos
    push_to_hub(checkpoint, REPO, token=TOKEN)


def test_bad_names_are_refused(hub, checkpoint):
    with pytest.raises(HubError, match="a/b/c"):
        push_to_hub(checkpoint, "a/b/c")
    assert not hub.repos


def damage(name):
    def change(folder):
        path = folder / name
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    return change


@pytest.mark.parametrize(
    "change, text",
    [
        (damage("model.safetensors"), "does not match its SHA-256"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "tokenizer_config.json"),
        (lambda folder: (folder / "results.json").unlink(), "neither results.json nor README.md"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "golden.json").write_text(TOKEN), "golden.json: holds the access token"),
    ],
    ids=["damaged", "tokenizer", "card", "config", "token"],
)
def test_what_must_not_be_published_stays(hub, checkpoint, change, text):
    change(checkpoint)
    with pytest.raises(ValueError, match=text) as raised:
        push_to_hub(checkpoint, REPO)
    assert not hub.requests and TOKEN not in str(raised.value)


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_push_to_hub_of_models_and_tokenizers(hub, state, trained):
    """Transformers' own method: one commit for a model with its code, one for its tokenizer."""
    model = build("ternary", "bert", state=state)
    model.push_to_hub(REPO)
    assert len(hub.repos[REPO]) == 2
    assert {"config.json", "model.safetensors", "modeling_ternary.py"} <= set(hub.files(REPO))
    AutoTokenizer.from_pretrained(trained).push_to_hub(REPO)
    assert "tokenizer.json" in hub.files(REPO) and "model.safetensors" in hub.files(REPO)


def test_save_and_push_in_one_call(hub, tmp_path):
    build("ternary", "bert", state="packed").save_pretrained(
        tmp_path / "x", push_to_hub=True, repo_id=REPO, commit_message="Said so", private=True
    )
    assert (tmp_path / "x/model.safetensors").read_bytes() == hub.files(REPO)["model.safetensors"]


def environment(hub, tmp_path):
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def test_command_line_to_a_machine_without_the_package(trained, tmp_path):
    """`qbert push` of the trained checkpoint; a fresh process without the package downloads it and answers alike."""
    hub, name = Hub(), "me/minilm"
    try:
        environ = {**os.environ, **environment(hub, tmp_path)}
        command = [sys.executable, "-m", "trainers.cli", "push", str(trained), name]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"published: {hub.url}/{name}/commit/" in done.stdout and TOKEN not in done.stdout + done.stderr
        files = hub.files(name)
        assert files["model.safetensors"] == (trained / "model.safetensors").read_bytes()
        assert TOKEN.encode() not in b"".join(files.values()) and "golden.json" in files
        given = {name: tensor % 1000 for name, tensor in inputs().items()}
        save_file(given, tmp_path / "inputs")
        job = ["AutoModelForSequenceClassification", name, str(tmp_path / "inputs"), str(tmp_path / "answer")]
        command = [sys.executable, str(HERE / "load_remote.py"), "hidden", json.dumps([job])]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        module, config, _ = json.loads(done.stdout.splitlines()[0])
        assert module.startswith("transformers_modules.me.minilm.") and config.startswith("transformers_modules.")
    finally:
        hub.close()
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(trained)(**given).logits
    assert torch.equal(load_file(tmp_path / "answer")["0"], expected)


def test_the_command_says_what_went_wrong_in_one_line(hub, checkpoint, capsys):
    from trainers.cli import main

    hub.faults = [Fault("/commit/", 403, times=99)]
    assert main(["push", str(checkpoint), REPO]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"qbert push: {REPO}: the token may not write") and len(error.splitlines()) == 1
