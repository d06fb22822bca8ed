"""The state folder: checkpoints, journal, published teachers, heartbeat. Arrays are numpy arrays."""
