"""A run's files, and what is made of them: progress, trackers, reports. Nothing here needs torch."""
