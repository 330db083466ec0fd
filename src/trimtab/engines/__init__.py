"""Engines sample responses. `local` runs in this process on the policy's own weights."""
