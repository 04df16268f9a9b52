"""The report of a flow run: usage of its worker jobs, their timeline, and what to set otherwise next time."""
