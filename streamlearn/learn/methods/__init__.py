"""Methods: what a step's costs are. Each is one file with one class that obeys `step.Method`."""
