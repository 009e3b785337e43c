"""The door to mmsegmentation: its decode heads for the model, its IoU metric for evaluation. Nothing else imports it.

mmsegmentation 1.2 imports `mmcv.ops` wherever a model is imported, and with it the compiled module `mmcv._ext`, which
mmcv-lite leaves out and the heads used here never call. Where it is missing, an empty module takes its place; any
operation that would need it then says so. A full mmcv is used as it is.

It also imports yapf, which as it is imported unpickles a grammar from the user's cache folder, and writes it there if it is
missing. Of two ranks that start for the first time one can read half a file. So yapf is imported when it is called for, which
is when mmengine dumps a config: never here.

The imports take seconds, so they happen inside the functions: only runs with a segmentation task pay for them.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any, NoReturn

from torch import nn

_COMPILED = "mmcv._ext"
_FORMATTER = ("yapf", "yapf.yapflib", "yapf.yapflib.yapf_api")


def _missing(name: str) -> Any:
    """`module.name` of the stand-in: a function that refuses to be called. Python's own attributes stay absent."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{_COMPILED}.{name} is part of the compiled mmcv, which mmcv-lite lacks: install mmcv"
        )

    return refuse


def _stand_in(name: str, attribute: Callable[[str], Any]) -> types.ModuleType:
    """A module whose attributes come from a function."""
    module = types.ModuleType(name, "Stands in for the module of this name.")
    module.__spec__ = ModuleSpec(name, loader=None)
    module.__getattr__ = attribute  # type: ignore[method-assign]
    return module


def _ensure_compiled_part() -> None:
    if importlib.util.find_spec(_COMPILED) is None:
        sys.modules[_COMPILED] = _stand_in(_COMPILED, _missing)


def _format_code(*args: Any, **kwargs: Any) -> Any:
    """yapf's `FormatCode`, imported now."""
    return importlib.import_module(_FORMATTER[-1]).FormatCode(*args, **kwargs)


def _of_formatter(name: str) -> Any:
    """`yapf.name`, imported now."""
    if name.startswith("__") and name != "__version__":
        raise AttributeError(name)
    return getattr(importlib.import_module(_FORMATTER[0]), name)


@contextmanager
def _importing() -> Iterator[None]:
    """For the block's imports: the compiled part is there, and yapf's place is taken by stand-ins that import it once used."""
    if _FORMATTER[0] in sys.modules:
        _ensure_compiled_part()
        yield
        return
    for name in _FORMATTER:
        sys.modules[name] = _stand_in(name, _of_formatter)
    sys.modules[_FORMATTER[-1]].FormatCode = _format_code  # type: ignore[attr-defined]
    try:
        _ensure_compiled_part()
        yield
    finally:
        for name in _FORMATTER:
            del sys.modules[name]


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
    with _importing():
        from mmseg.models.decode_heads import UPerHead

    return _build(UPerHead, config)


def fcn_head(**config: Any) -> nn.Module:
    """mmsegmentation's `FCNHead(**config)`: list of level maps -> logits `[B, C, h, w]` of level `in_index`."""
    with _importing():
        from mmseg.models.decode_heads import FCNHead

    return _build(FCNHead, config)


def iou_metric() -> Any:
    """mmsegmentation's `IoUMetric` class, for its two static functions; these need no compiled part."""
    with _importing():
        from mmseg.evaluation import IoUMetric

    return IoUMetric
