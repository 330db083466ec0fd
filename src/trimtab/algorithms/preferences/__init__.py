"""The preference losses: one base, and a file for each kind of data they look at."""
