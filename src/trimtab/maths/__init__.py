"""Pure functions: the mathematics of alignment, without models, engines or files."""
