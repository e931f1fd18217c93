"""The layers of each stage at a launch: balanced by cost, by weights where that does not fit.

Stages get them from the head, so all processes of a launch agree. Stored KV is kept by layer and found with any split.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from cluster.common.errors import PreflightError
from cluster.common.text_format import one_line
from cluster.config.deployment import Deployment
from cluster.latency.balance import split_stages, stage_layers, with_layers
from cluster.latency.measured import Costs, Measurements
from cluster.latency.pipeline_work import usual_costs
from protos.node.environment import usable_cores

Started = TypeVar("Started")
_log = logging.getLogger(__name__)


def balance_stages(deployment: Deployment) -> Deployment:
    """Return the deployment with the layers of each stage that a launch begins with; logs what they are and why."""
    if deployment.config.cluster.pipeline_parallel_size == 1:
        return deployment
    cores = usable_cores()
    usual = usual_costs(deployment, cores)
    measured = Measurements.of(deployment.config.data_dir, cores).layer_costs_of(deployment, usual)
    table = Costs(usual, "hardware table")
    deployment, notes = split_stages(deployment, deployment.max_model_len, table, measured)
    for note in notes:
        _log.info("%s", note)
    return deployment


def launch_fitting(deployment: Deployment, launch: Callable[[Deployment], Started]) -> tuple[Deployment, Started]:
    """Launch a deployment, with its stages split by weights where admission refuses the split by cost.

    Returns the deployment that runs, and what `launch` returned. Raises what `launch` raises.
    """
    try:
        return deployment, launch(deployment)
    except PreflightError as error:
        plain = with_layers(deployment, None)
        if stage_layers(plain) == stage_layers(deployment):
            raise
        _log.warning(
            "stages of %s layers do not fit, they get %s (%s)",
            list(stage_layers(deployment)), list(stage_layers(plain)), one_line(error),
        )  # fmt: skip
    return plain, launch(plain)
