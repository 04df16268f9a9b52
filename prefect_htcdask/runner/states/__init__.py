"""States of task runs at the Prefect API, where no worker can report them."""
