"""Fixtures that several test files share."""

import pytest
from tiny_models import LAYER_TYPES, tiny_model


@pytest.fixture(scope="session", params=list(LAYER_TYPES))
def model(request):
    return tiny_model(request.param)
