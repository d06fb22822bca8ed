"""Methods: the costs of a step. Each file has one class that implements `step.Method`."""
