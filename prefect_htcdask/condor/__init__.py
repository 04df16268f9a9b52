"""All that touches HTCondor."""
