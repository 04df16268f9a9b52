"""The command ``doctor``: whether a flow could run here, link by link."""
