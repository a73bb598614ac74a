"""The code that travels with a checkpoint, written into a folder that was saved without it or with an older one."""

import json
import os
import shutil
import sys

from transformers.dynamic_module_utils import get_relative_import_files

from .checkpoint import CheckpointError
from .integration import MODEL_CLASSES


def write_remote_code(folder: str | os.PathLike) -> list[str]:
    """Copy this package's code into a checkpoint folder and name it in `config.json`, as `save_pretrained` does.

    Returns the names of the copied files.

    Raises:
        CheckpointError: `config.json` names no model of this package.
    """
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
        name = fields["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: is no config with field 'architectures' ({error!r})") from None
    model_class = MODEL_CLASSES.get(name)
    if model_class is None:
        raise CheckpointError(f"{path}: field 'architectures' must name a model of this package, found {name!r}")
    source = sys.modules[model_class.__module__].__file__
    files = sorted({source, *get_relative_import_files(source)})
    for file in files:
        shutil.copyfile(file, os.path.join(folder, os.path.basename(file)))
    fields["auto_map"] = model_class.config_class.remote_code
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    os.replace(path + ".tmp", path)
    return [os.path.basename(file) for file in files]
