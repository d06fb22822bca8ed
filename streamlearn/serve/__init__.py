"""A server process: it answers predictions from the newest published teacher, and appends to the log."""
