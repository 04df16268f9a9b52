"""Makes two example automations on the Prefect server: workers held -> a notification; a flow run crashed -> the sweep.

    python deployments/automations.py                            (the sweep alone)
    python deployments/automations.py --notify slack-webhook/pool

The sweep is the deployment `sweep-leftovers/leftovers` of deployments/prefect.yaml. The notification goes to a
notification block, named TYPE/NAME as in the UI's address of it. Run again, the script replaces what it made.

A trigger sees an event's name and the labels of its resources: `htcdask.category` is the diagnosis, so that one can
be told of held_memory alone, say. All events and their resources: prefect_htcdask/supervisor/report/events.py.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated
from uuid import UUID

import typer
from prefect.automations import Automation, EventTrigger, Posture, RunDeployment, SendNotification
from prefect.client.orchestration import SyncPrefectClient, get_client

SWEEP = "sweep-leftovers/leftovers"
HELD_NAME = "htcdask: held workers are told of"
CRASHED_NAME = "htcdask: what a crashed flow run left is swept"


def held_notifies(block: UUID) -> Automation:
    """HTCondor held workers of a flow run: say so, once in five minutes for each worker group of it."""
    return Automation(
        name=HELD_NAME,
        trigger=EventTrigger(
            expect={"htcdask.job.held"},
            match={"prefect.resource.id": "htcdask.worker-group.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(minutes=5),
        ),
        actions=[
            SendNotification(
                block_document_id=block,
                subject="HTCondor holds workers of {{ flow_run.name }}",
                body="{{ event.payload.count }} worker jobs of group {{ event.payload.group }} "
                "({{ event.payload.category }}): {{ event.payload.summary }}\n{{ event.payload.remedy }}\n"
                "{{ flow_run | ui_url }}",
            )
        ],
    )


def crash_sweeps(deployment: UUID) -> Automation:
    """A flow run crashed: run the sweep, which removes what it left in the pool. Its own crash starts no other."""
    return Automation(
        name=CRASHED_NAME,
        trigger=EventTrigger(
            expect={"prefect.flow-run.Crashed"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": "!sweep-leftovers"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[RunDeployment(source="selected", deployment_id=deployment)],
    )


def replace(client: SyncPrefectClient, automation: Automation) -> Automation:
    """Create an automation in place of those of its name."""
    for earlier in client.read_automations_by_name(automation.name):
        client.delete_automation(earlier.id)
    return automation.create()


def main(
    notify: Annotated[
        str | None, typer.Option(help="Notification block that is told of held workers: TYPE/NAME.")
    ] = None,
) -> None:
    """Make the automations."""
    with get_client(sync_client=True) as client:
        automations = [crash_sweeps(client.read_deployment_by_name(SWEEP).id)]
        if notify is not None:
            kind, _, name = notify.partition("/")
            automations.append(held_notifies(client.read_block_document_by_name(name, kind).id))
        for automation in automations:
            typer.echo(f"{replace(client, automation).name}")


if __name__ == "__main__":
    typer.run(main)
