"""Environment of the whole suite; pytest reads it before any test module imports torch."""

import os

import pytest

ON_GPU = os.environ.get("MODSQUAD_TEST_GPU") == "1"

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"
if not ON_GPU:
    # The same suite on every machine: without this, torch and DeepSpeed would take a GPU where there is one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["DS_ACCELERATOR"] = "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` unless the suite was started for a GPU."""
    for item in items:
        if "gpu" in item.keywords and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and MODSQUAD_TEST_GPU=1"))
