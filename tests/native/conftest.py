import pytest


native = pytest.importorskip("modeling_qbert.native", reason="no native engine here", exc_type=ImportError)


@pytest.fixture(params=native.LEVELS)
def level(request):
    """Every compiled path that this CPU has."""
    before = native.level()
    if native.set_level(request.param) != request.param:
        native.set_level(before)
        pytest.skip(f"this CPU or QBERT_CPU has no {request.param}")
    yield request.param
    native.set_level(before)
