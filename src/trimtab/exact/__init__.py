"""The exact lab: problems small enough to list every response, where the best possible policy is known."""
