import logging
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# With --import-mode=importlib a test folder is not on the path; the corner models lie in it.
sys.path.insert(0, str(Path(__file__).parent))

# A model is many draws; the first example also imports parts of torch.
slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large]
common = {"deadline": None, "suppress_health_check": slow_is_fine}
settings.register_profile("dev", max_examples=25, **common)
settings.register_profile("ci", max_examples=200, derandomize=True, database=None, **common)
settings.register_profile("nightly", max_examples=2000, print_blob=True, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(autouse=True, scope="module")
def _quiet_plans():
    """Notes of plans and of small configs are no news; tests that run afterwards listen to them."""
    loggers = [logging.getLogger(name) for name in ("automodel_fn", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
