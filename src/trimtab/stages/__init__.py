"""The stages: each a function that reads like its algorithm, from a recipe to a run directory."""
