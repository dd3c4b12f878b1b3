"""What the analysis commands' tests share."""

import pytest


@pytest.fixture
def quick_numerics(monkeypatch):
    """A check of numerics that is fast, and safe on any CPU: peaked weights amplify rounding on so small an image."""
    monkeypatch.setattr("elfatt.analysis.timing.NUMERICS_SIDE", 32)
    monkeypatch.setattr("elfatt.analysis.timing.PEAKED", 1)
