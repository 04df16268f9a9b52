"""What people see of a flow run: artifacts, Prefect events, lines in the terminal."""
