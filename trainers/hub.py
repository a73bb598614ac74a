"""Publishing a checkpoint folder on the Hub: model, code, tokenizer, card and results in one commit, or nothing.

What is published is assembled in a temporary folder; the checkpoint itself is only read. The Hub's own answers become
one clear text each, a token never enters any of them, and the same call run again completes an interrupted push.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub import CommitOperationAdd, EvalResultEntry, HfApi, eval_result_entries_to_yaml
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from modeling_qbert import verify_checkpoint, write_remote_code

from .card import CARD_NAME, write_card
from .results import RESULTS_NAME, read_results
from .tasks import TASKS


try:
    import httpx2 as _httpx  # what huggingface_hub 2 talks with
except ImportError:
    import httpx as _httpx


# What may leave the machine. Everything else in the folder stays: pickles above all (`training_args.bin`,
# `optimizer.pt`), and whatever a user keeps beside a checkpoint.
PUBLISHED = re.compile(
    r"config\.json|model\.safetensors|model\.onnx|golden\.json|latency\.json|README\.md|"
    + re.escape(RESULTS_NAME)
    + "|"
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(txt|json)|merges\.txt|"
    r"modules\.json|config_sentence_transformers\.json|sentence_bert_config\.json|\d_(Pooling|Normalize)/config\.json"
)
FOREIGN_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model|tf_model|flax_model)\b.*\.(safetensors|bin|h5|msgpack|json)"
)

_TRANSPORT_ERRORS = (_httpx.TimeoutException, _httpx.NetworkError, _httpx.RemoteProtocolError)
TRIES = 5
RETRIED = (429, 500, 502, 503, 504)
TIMEOUT = 60.0  # seconds without a byte from the Hub
MAX_WAIT = 60.0  # seconds between two tries, whatever Retry-After says

_TEXTS = {
    401: "the Hub does not accept the token; log in with `hf auth login` or set HF_TOKEN",
    403: "the token may not write there; use one with write access to the repository's owner",
    404: "not found; check the name, and that the token may see it",
    409: "the repository is being changed by something else; run the same command again",
    412: "another commit came in between; run the same command again",
    413: "the Hub finds the files too large",
    429: "the Hub asks for fewer requests; wait a few minutes and run the same command again",
}


class HubError(RuntimeError):
    """A push that did not complete; local files are as they were."""


def push_to_hub(
    checkpoint: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Publish a checkpoint folder as the model `repo_id` and return the URL of the commit.

    Args:
        checkpoint: folder of a packed or latent model with its tokenizer, and `results.json` or `README.md`.
        token: access token. Default: that of `hf auth login` or HF_TOKEN.
        private: visibility of a repository that does not exist yet. Default: the owner's.
        revision: branch, created if missing. Default: main.

    Raises:
        ValueError: a folder that must not be published: damaged, without tokenizer or card, or holding the token.
        HubError: what the Hub answered, and what to do.
    """
    checkpoint = Path(checkpoint)
    secret = token or huggingface_hub.get_token()
    with tempfile.TemporaryDirectory(prefix="qbert-push-") as folder:
        names = assemble(checkpoint, repo_id, Path(folder))
        _refuse_secret(Path(folder), names, secret)
        return _Push(repo_id, token, secret).run(Path(folder), names, private, revision)


def assemble(checkpoint: Path, repo_id: str, folder: Path) -> list[str]:
    """Copy what is published of `checkpoint` into the empty `folder`, with code, card and `.eval_results`.

    Returns the names of the files, relative to `folder`.
    """
    if not (checkpoint / "config.json").is_file() or not (checkpoint / "model.safetensors").is_file():
        raise ValueError(f"{checkpoint}: expected a checkpoint with config.json and model.safetensors")
    if "quantization_config" in json.loads((checkpoint / "config.json").read_bytes()):
        verify_checkpoint(checkpoint)
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.is_file() and PUBLISHED.fullmatch(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    if not (folder / "tokenizer_config.json").exists():
        raise ValueError(f"{checkpoint}: has no tokenizer_config.json; save the tokenizer into the same folder")
    write_remote_code(folder)
    if (folder / RESULTS_NAME).exists():
        results = read_results(folder / RESULTS_NAME)
        _write_eval_results(folder, results)
        write_card(folder, results, model_id=repo_id)
    elif not (folder / CARD_NAME).exists():
        raise ValueError(f"{checkpoint}: has neither {RESULTS_NAME} nor {CARD_NAME}; a published model needs a card")
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _write_eval_results(folder: Path, results: dict) -> None:
    """`.eval_results/<task>.yaml` of a task whose data set is on the Hub: the score for the Hub's benchmarks."""
    task = TASKS.get(results["task"]) if results["task"] else None
    if task is None or not task.dataset or task.name is None:  # benchmarks are known by their configuration
        return
    notes = f"{results['main_metric']}, {results['split']} split, {results['rows']} rows, seed {results['seed']}"
    value = results["packed"]["metrics"][results["main_metric"]]
    entry = EvalResultEntry(dataset_id=task.dataset, task_id=task.name, value=value, notes=notes)
    path = folder / ".eval_results" / f"{task.name}.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))


def _refuse_secret(folder: Path, names: list[str], secret: str | None) -> None:
    for name in names:
        if secret and secret.encode() in (folder / name).read_bytes():
            raise ValueError(f"{name}: holds the access token; remove it before publishing")


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """huggingface_hub's client waits for ever by itself."""
    client = huggingface_hub.get_session()
    previous = client.timeout
    client.timeout = seconds
    try:
        yield
    finally:
        client.timeout = previous


class _Push:
    def __init__(self, repo_id: str, token: str | None, secret: str | None):
        self.repo_id, self.secret, self.api = repo_id, secret, HfApi(token=token)

    def run(self, folder: Path, names: list[str], private: bool | None, revision: str | None) -> str:
        for attempt in range(1, TRIES + 1):
            try:
                with _timeout(TIMEOUT):
                    return self._commit(folder, names, private, revision)
            except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError, *_TRANSPORT_ERRORS) as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                again = status in RETRIED or (status is None and isinstance(error, _TRANSPORT_ERRORS))
                if not again or attempt == TRIES:
                    raise HubError(self._explain(error, status, attempt)) from None
                time.sleep(_wait(error, attempt))
        raise AssertionError("unreachable")

    def _commit(self, folder: Path, names: list[str], private: bool | None, revision: str | None) -> str:
        """One commit on top of what is there now. After a lost answer it finds nothing left to change."""
        self.api.create_repo(self.repo_id, private=private, exist_ok=True)
        if revision is not None:
            self.api.create_branch(self.repo_id, branch=revision, exist_ok=True)
        info = self.api.model_info(self.repo_id, revision=revision)
        there = {entry.rfilename for entry in info.siblings or ()}
        foreign = sorted(name for name in there - set(names) if FOREIGN_WEIGHTS.fullmatch(name))
        if foreign:
            raise HubError(
                f"{self.repo_id}: holds other weights {foreign}, and which ones are loaded would be a guess; "
                "delete them there or choose another repository"
            )
        commit = self.api.create_commit(
            self.repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names],
            commit_message="Upload checkpoint",
            revision=revision,
            parent_commit=info.sha,
        )
        return commit.commit_url

    def _explain(self, error: Exception, status: int | None, tries: int) -> str:
        if isinstance(error, LocalTokenNotFoundError):
            reason = "there is no access token; log in with `hf auth login` or set HF_TOKEN"
        elif isinstance(error, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set, so the Hub is not asked"
        elif status in _TEXTS:
            reason = f"{_TEXTS[status]} ({status})"
        elif status is not None and status >= 500:
            reason = f"the Hub has a fault of its own ({status}); run the same command again later"
        elif isinstance(error, _httpx.TimeoutException):
            reason = f"the Hub did not answer for {TIMEOUT:.0f} s; run the same command again"
        elif isinstance(error, _TRANSPORT_ERRORS):
            reason = f"the connection to the Hub broke ({type(error).__name__}); run the same command again"
        else:
            reason = str(error).split("\n")[0]
        text = f"{self.repo_id}: {reason}"
        if tries > 1:
            text += f"; tried {tries} times"
        return text.replace(self.secret, "***") if self.secret else text


def _wait(error: Exception, attempt: int) -> float:
    """Seconds before the next try: what the Hub asks for, else 1, 2, 4, 8."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return min(float(headers.get("Retry-After", 2 ** (attempt - 1))), MAX_WAIT)
    except ValueError:
        return float(2 ** (attempt - 1))
