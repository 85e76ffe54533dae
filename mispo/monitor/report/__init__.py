"""The report of a run: HTML page and pictures."""
