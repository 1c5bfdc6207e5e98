"""From a plan to the tasks of a method."""

from __future__ import annotations

from nni_topo.errors import ConfigError, unknown_name
from nni_topo.recovery.mixing import ChannelTask, PairTask
from nni_topo.recovery.networks import Networks
from nni_topo.recovery.plan import Plan, Solvable
from nni_topo.recovery.reconstruct import ReconstructTask
from nni_topo.recovery.tasks import Task
