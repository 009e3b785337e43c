"""The door to mmsegmentation: its decode heads for the model, its IoU metric for evaluation. Nothing else imports it.

mmsegmentation 1.2 imports `mmcv.ops` wherever a model is imported, and with it the compiled module `mmcv._ext`, which
mmcv-lite leaves out and the heads used here never call. Where it is missing, an empty module takes its place; any
operation that would need it then says so. A full mmcv is used as it is.

The imports take seconds, so they happen inside the functions: only runs with a segmentation task pay for them.
"""

import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any, NoReturn

from torch import nn

_COMPILED = "mmcv._ext"


def _missing(name: str) -> Any:
    """`module.name` of the stand-in: a function that refuses to be called. Python's own attributes stay absent."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{_COMPILED}.{name} is part of the compiled mmcv, which mmcv-lite lacks: install mmcv"
        )

    return refuse


def _stand_in() -> types.ModuleType:
    module = types.ModuleType(_COMPILED, "Stands in for the compiled part of mmcv.")
    module.__spec__ = ModuleSpec(_COMPILED, loader=None)
    module.__getattr__ = _missing  # type: ignore[method-assign]
    return module


def _ensure_compiled_part() -> None:
    if importlib.util.find_spec(_COMPILED) is None:
        sys.modules[_COMPILED] = _stand_in()


def _build(head: Callable[..., Any], config: dict[str, Any]) -> nn.Module:
    """The decode head with mmsegmentation's own initial values of its classifier (its `init_cfg`)."""
    # The head's own loss is not used, as `heads/segmentation.py` needs sums; but building it would warn twice.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="``build_loss`` would be deprecated", category=UserWarning)
        built = head(loss_decode={"type": "CrossEntropyLoss", "avg_non_ignore": True}, **config)
    nn.init.normal_(built.conv_seg.weight, std=0.01)
    nn.init.zeros_(built.conv_seg.bias)
    return built


def uper_head(**config: Any) -> nn.Module:
    """mmsegmentation's `UPerHead(**config)`: list of level maps -> logits `[B, C, h, w]` at the finest level's size."""
    _ensure_compiled_part()
    from mmseg.models.decode_heads import UPerHead

    return _build(UPerHead, config)


def fcn_head(**config: Any) -> nn.Module:
    """mmsegmentation's `FCNHead(**config)`: list of level maps -> logits `[B, C, h, w]` of level `in_index`."""
    _ensure_compiled_part()
    from mmseg.models.decode_heads import FCNHead

    return _build(FCNHead, config)


def iou_metric() -> Any:
    """mmsegmentation's `IoUMetric` class, for its two static functions; these need no compiled part."""
    from mmseg.evaluation import IoUMetric

    return IoUMetric
