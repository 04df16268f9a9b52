"""From demand and supply to a decision."""
