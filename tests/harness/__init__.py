"""Long-running tests and measurements of the project itself; not in the wheel."""
