"""Model quality: prequential scores, drift alarms, the guard, and the choice of the served network."""
