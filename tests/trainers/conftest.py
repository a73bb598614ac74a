import gc

import pytest


@pytest.fixture(scope="module")
def quick_garbage_collection():
    """Every `train` collects garbage, which walks through all imported modules unless they are frozen."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
