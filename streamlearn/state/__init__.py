"""What survives: checkpoints, journal, published teachers, heartbeat. Numpy arrays in, numpy arrays out."""
