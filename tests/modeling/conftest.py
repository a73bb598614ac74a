import pytest
from damage import make_good


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """[(folder, logits)] of sound checkpoints: read-only, tests copy them."""
    return make_good(tmp_path_factory)
