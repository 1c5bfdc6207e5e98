"""Patch of how NNI starts experiments."""

from __future__ import annotations

import inspect

from nni.experiment import launcher

_SECONDS = 60


def wait_for_manager() -> bool:
    """Give NNI's manager a minute to answer.

    Place: ``nni/experiment/launcher.py``, ``_check_rest_server``. Cause: it asks the manager four times within three
    seconds and then gives up the experiment. ``nnictl`` doesn't import this package, so it still waits only seconds.
    """
    check = launcher._check_rest_server
    tries = inspect.signature(check).parameters["retry"].default
    if tries >= _SECONDS:
        return False
    check.__defaults__ = tuple(_SECONDS if value == tries else value for value in check.__defaults__)
    return True
