"""NNI's manager gets a minute to answer; an NNI that waits as long is left alone."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from nni.experiment import launcher

from nni_topo.compat import launching


def tries() -> Any:
    return inspect.signature(launcher._check_rest_server).parameters["retry"].default


def test_the_manager_is_asked_sixty_times() -> None:
    assert tries() == 60
    assert launching.wait_for_manager() is False


@pytest.mark.parametrize(("retry", "expected"), [(3, 60), (59, 60), (60, 60), (90, 90)])
def test_the_number_of_tries_is_raised_and_nothing_else(
    retry: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(port: int, retry: int = retry, url_prefix: str | None = None, pause: float = 0.5) -> None:
        """Ask the manager."""

    monkeypatch.setattr(launcher, "_check_rest_server", check)
    assert launching.wait_for_manager() is (retry < 60)
    assert tries() == expected
    assert check.__defaults__ == (expected, None, 0.5)
    assert launching.wait_for_manager() is False
