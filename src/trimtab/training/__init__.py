"""The one update every stage takes, its optimiser and its checkpoints."""
