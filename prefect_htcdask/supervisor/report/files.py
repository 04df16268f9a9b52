"""What is left of a flow run beside its workers' logs: the numbers, the report, and a picture."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect_htcdask.supervisor.protocol import SupervisorConfig
from prefect_htcdask.supervisor.report.markdown import FILES, markdown
from prefect_htcdask.supervisor.report.plot import svg, why_none
from prefect_htcdask.utils.private_file import write_private

logger = logging.getLogger(__name__)


def write_report(plan: SupervisorConfig, summary: Mapping[str, Any]) -> None:
    """Write numbers, report and picture; nothing where nobody wants them. Raises nothing.

    The supervisor does it, not the flow's process: it is there also where that one is gone.

    Args:
        plan: what the flow's process handed over.
        summary: the summary, with its `report`.
    """
    if plan.report is None or "report" not in summary:
        return
    directory = Path(plan.run_directory)
    text, picture, numbers = FILES
    try:
        write_private(directory / numbers, json.dumps(dict(summary)))
        no_picture = why_none(plan.report.picture)
        title = f"{plan.flow_run.flow_name} / {plan.flow_run.name}" if plan.flow_run is not None else ""
        write_private(directory / text, markdown(summary, directory=str(directory), title=title, picture=no_picture))
        if not no_picture and summary["report"]["timeline"]["queued"]:
            write_private(directory / picture, svg(summary["report"]))
    except Exception:
        logger.exception("the report could not be written to %s", directory)
