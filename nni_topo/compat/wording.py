"""Patches of what NNI says: less where nothing is wrong, and words where it raises a bare ``AssertionError``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from types import CodeType
from typing import Any

from nni.common.concrete_trace_utils import operator_patcher
from nni.compression.base.compressor import Compressor
from nni.compression.pruning import movement_pruner, scheduled_pruner, slim_pruner, taylor_pruner
from nni.compression.speedup import mask_conflict, model_speedup
from nni.compression.utils import evaluator

from nni_topo.errors import ConfigError, shown

_TRACED = "optimizers and lr_schedulers must be of nni.trace, as nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)"
_STEPS = "interval_steps must be at least training_steps"
_LENGTH = "max_steps and max_epochs must be left out where training_steps says how long"
# rules by the methods that assert them, and the arguments, or attributes, that are shown
_RULES: list[tuple[type[Any], str, str, tuple[str, ...]]] = [
    (Compressor, "__init__", "evaluator must be an evaluator of NNI", ("evaluator",)),
    (
        Compressor,
        "_fusion_compress",
        "to prune in training needs max_steps or max_epochs, and an evaluator",
        ("evaluator",),
    ),
    (
        scheduled_pruner._ComboPruner,
        "__init__",
        "a schedule must be given a pruner that prunes in steps, and an evaluator, that pruner's or its own",
        ("pruner", "evaluator"),
    ),
    (
        scheduled_pruner._ComboPruner,
        "compress",
        "max_steps must be at least total_times * interval_steps",
        ("max_steps", "total_times", "interval_steps"),
    ),
    (taylor_pruner.TaylorPruner, "_register_trigger", _STEPS, ("interval_steps", "training_steps")),
    (slim_pruner.SlimPruner, "_register_trigger", _STEPS, ("interval_steps", "training_steps")),
    (taylor_pruner.TaylorPruner, "_single_compress", _LENGTH, ("max_steps", "max_epochs")),
    (slim_pruner.SlimPruner, "_single_compress", _LENGTH, ("max_steps", "max_epochs")),
    (
        movement_pruner.MovementPruner,
        "__init__",
        "warmup_step must be at least 0 and below cooldown_begin_step",
        ("warmup_step", "cooldown_begin_step"),
    ),
    (evaluator.TorchEvaluator, "__init__", _TRACED, ("optimizers", "lr_schedulers")),
    (evaluator.TorchEvaluator, "bind_model", "an evaluator's model must be a torch.nn.Module", ("model",)),
]


def log_details_on_demand() -> bool:
    """Log what a speedup does, some 120 lines, and what ``and`` in a library's code means to a tracer, not at once.

    Place: ``nni/runtime/log.py``, ``nni/common/concrete_trace_utils/operator_patcher.py`` and
    ``nni/compression/speedup/mask_conflict.py``. Cause: the level of all loggers is INFO; each ``and`` and ``or`` in
    the code that is read is warned of, 324 times for a BERT, and so is any layer after a pruned one; two words are
    printed; on every version.
    ``logging.getLogger("nni.compression").setLevel("INFO")`` brings the lines back. Returns True, but for a second call
    and where that logger has a level.
    """
    logger = logging.getLogger("nni.compression")
    if logger.level:
        return False
    logger.setLevel(logging.WARNING)
    # each speedup gives its own logger the level INFO
    details = logging.getLogger(model_speedup.__name__)
    details.addFilter(lambda record: record.levelno >= logger.level)
    for module, words in ((operator_patcher, '"and/or"'), (mask_conflict, "both dim0 and dim1 masks")):
        filtered = logging.getLogger(module.__name__)
        filtered.addFilter(lambda record, words=words: words not in record.getMessage())  # type: ignore[misc]
    mask_conflict.print = lambda *words: None
    return True


def trust_tested_pruners() -> bool:
    """Let schedules take this package's pruners without a warning.

    Place: ``nni/compression/pruning/scheduled_pruner.py``, ``_ComboPruner.__init__``. Cause: it says "Compatibility not
    tested" of each pruner that isn't NNI's, on every version. The conformance suite tests ours; of others it goes on to
    say so. Returns True, but for a second call.
    """
    cls = scheduled_pruner._ComboPruner
    if hasattr(cls.__init__, "_nni_topo_trust"):
        return False
    original = cls.__init__

    @wraps(original)
    def init(self: Any, pruner: Any, *args: Any, **kwargs: Any) -> None:
        ours = type(pruner).__module__.startswith("nni_topo.")
        untested = lambda record: not (ours and "Compatibility not tested" in record.getMessage())  # noqa: E731
        logger = logging.getLogger(scheduled_pruner.__name__)
        logger.addFilter(untested)
        try:
            original(self, pruner, *args, **kwargs)
        finally:
            logger.removeFilter(untested)

    init._nni_topo_trust = True  # type: ignore[attr-defined]
    cls.__init__ = init
    return True


def word_assertions() -> bool:
    """Say which rule an argument breaks where evaluators, schedules and pruners assert it without a word.

    Place: ``nni/compression/utils/evaluator.py``, ``base/compressor.py`` and four files of ``pruning``. Cause: bare
    assertions on arguments, on every version. What is raised is a ConfigError; assertions in code that these methods
    call, the user's too, stay as they are. Returns True, but for a second call.
    """
    if hasattr(_RULES[0][0].__dict__[_RULES[0][1]], "_nni_topo_words"):
        return False
    for cls, name, rule, names in _RULES:
        setattr(cls, name, _worded(cls.__dict__[name], rule, names))
    return True


def _worded(original: Callable[..., Any], rule: str, names: tuple[str, ...]) -> Callable[..., Any]:
    code = _code(original)

    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except AssertionError as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            if trace is None or trace.tb_frame.f_code is not code or str(error):
                raise
            given = {name: trace.tb_frame.f_locals.get(name, getattr(self, name, None)) for name in names}
            told = ", ".join(f"{name} {shown(value)}" for name, value in given.items())
            raise ConfigError(f"{rule}, got {told} ({type(self).__name__})") from None

    method._nni_topo_words = True  # type: ignore[attr-defined]
    return method


def _code(function: Callable[..., Any]) -> CodeType:
    """Return the code of NNI's own function, inside the wrappers that patches put around it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function.__code__
