"""The flow's process: the task runner, its futures, and what Prefect sees of a flow run."""
