"""What flow runs leave behind is removed from any later process: by hooks of the flow, and by the sweep."""

from prefect_htcdask.cleanup.hooks import remove_leftover_jobs, with_cleanup

__all__ = ["remove_leftover_jobs", "with_cleanup"]
