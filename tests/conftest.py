import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may use the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402


logging.disable_progress_bar()
torch.set_num_threads(1)  # fixtures of a module run before the one below


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    """Same numbers on every machine: one torch thread, and a generator that no other test has moved."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
