"""What all tests share: hypothesis profiles, and the option that rewrites the golden texts.

pytest --hypothesis-profile=fuzz        many more random examples (`make fuzz`)
pytest --update-golden                  accept the golden texts as they are now
"""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("XDG_CACHE_HOME", tempfile.mkdtemp(prefix="stitch-tests-"))  # compiled code, for one run only

settings.register_profile("usual", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", settings.get_profile("usual"), max_examples=5000)
settings.load_profile("usual")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden texts instead of comparing them")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))
