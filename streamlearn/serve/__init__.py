"""A server process: answers predictions from the newest published teacher, and appends what it is given to the log."""
