"""The real HTCondor pool and gateway that tests run against."""
