"""Settings that all tests share."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
