"""Prefect flows: which tasks run, in what order, on which runner."""
