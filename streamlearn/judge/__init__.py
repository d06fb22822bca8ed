"""Truth about the model, from labels that came after the predictions they judge."""
