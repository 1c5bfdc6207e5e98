"""A trial's own parameters: NNI 3.0 can swap those of trials that start together.

NNI's manager gives the next parameters in its queue to whichever trial asks first, while its database, its tables and
the tuner's ``trial_end`` hold them to be those of the trial that was submitted first
(``nni_node/training_service/v3/compat.js``). ``nni-topo experiment run`` lets the manager itself pair them
(``compat.PAIRING``); what is here needs no preloaded script, so that it holds under ``nnictl`` too.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import nni
import requests
from nni.runtime.env_vars import trial_env_vars

_logger = logging.getLogger(__name__)

_SECONDS = 20.0


def next_parameters() -> dict[str, Any]:
    """Return the parameters that NNI's tables show for this trial, in place of ``nni.get_next_parameter()``.

    Returns
    -------
    dict
        What the tuner proposed. Results that are reported later are booked to it.

    Notes
    -----
    Asks the manager, which a trial on its machine can reach. Elsewhere the parameters are those that NNI sent;
    ``nni-topo experiment`` pairs them with their scores by NNI's number of the proposal.

    Examples
    --------
    In a trial of your own::

        from nni_topo.runs.experiment import next_parameters

        ratio = next_parameters()["ratio"]
    """
    sent = nni.get_next_parameter()
    kept = _kept(trial_env_vars.NNI_TRIAL_COMMAND_CHANNEL, nni.get_trial_id())
    if kept is None:
        return dict(sent)
    # results are reported under the number of these
    nni.trial._params = kept
    return dict(kept["parameters"])


def pair_by_result(jobs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by trial, as the REST API lists them, the parameters that it ran, as far as it can be told."""
    shown = {job["trialJobId"]: json.loads(job["hyperParameters"][-1]) for job in jobs if job.get("hyperParameters")}
    numbered = {str(proposal.get("parameter_id")): proposal["parameters"] for proposal in shown.values()}
    ran = {}
    for job in jobs:
        own = shown.get(job["trialJobId"], {"parameters": {}})
        # a result carries the number of the proposal that ran; without one the trial's own row has to do, and with its
        # own, too: NNI alone gives numbers out twice when it resumes an experiment
        number = str(((job.get("finalMetricData") or [{}])[-1]).get("parameterId"))
        is_own = number == str(own.get("parameter_id"))
        ran[job["trialJobId"]] = own["parameters"] if is_own else numbered.get(number, own["parameters"])
    return ran


def _kept(channel: str | None, trial: str) -> dict[str, Any] | None:
    """Return the manager's record of a trial's parameters; None where it can't be reached."""
    if channel is None or "/env/" not in channel:
        return None
    parts = urlsplit(channel)
    url = f"{parts.scheme}://{parts.netloc}{parts.path.rpartition('/env/')[0]}/api/v1/nni/trial-jobs/{trial}"
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        try:
            reply = requests.get(url, timeout=_SECONDS)
        except OSError:
            return None
        if reply.status_code == requests.codes.not_found:
            return None
        try:
            job = reply.json()
        except ValueError:
            job = None
        proposals = job.get("hyperParameters") if isinstance(job, dict) else None
        found: dict[str, Any] | None = nni.load(proposals[-1]) if proposals else None
        if found is not None:
            return found
        # the manager writes a trial down a moment after it has started it
        time.sleep(0.2)
    _logger.warning("NNI's manager has no record of trial %s: its row may show another trial's parameters", trial)
    return None
