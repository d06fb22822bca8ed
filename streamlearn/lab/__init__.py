"""Simulation and evaluation on labelled data sets: seeded streams, label delays, drift, a local Kafka."""
