"""Fetches the tests of the installed Transformers: `python fetch.py FOLDER` leaves FOLDER/transformers_tests.

They are in the source distribution only. What its top-level tests import from folders that it does not ship is
replaced by the empty classes below: tests of exporters and of text generation, which an encoder does not have.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": (
        'config_common_kwargs = {"return_dict": False, "output_hidden_states": True, "dtype": "float16",\n'
        '    "chunk_size_feed_forward": 0, "architectures": ["BertModel"], "finetuning_task": "translation",\n'
        '    "id2label": {0: "label"}, "label2id": {"label": "0"}, "problem_type": "regression"}\n'
    ),
}


def fetch(folder: Path) -> None:
    release = version("transformers")
    done = folder / "VERSION"
    if done.exists() and done.read_text() == release:
        return
    target = folder / "transformers_tests"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", "-d", download]
        subprocess.run([*command, f"transformers=={release}"], check=True)
        with tarfile.open(next(Path(download).glob("transformers-*.tar.gz"))) as archive:
            for member in archive.getmembers():
                parts = Path(member.name).parts
                if len(parts) == 3 and parts[1] == "tests" and member.isfile():
                    (target / parts[2]).write_bytes(archive.extractfile(member).read())
    for name, text in STUBS.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(text)
        (target / name).parent.joinpath("__init__.py").touch()
    (target / "__init__.py").touch()
    done.write_text(release)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
