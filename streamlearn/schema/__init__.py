"""A user's records: formats, fields, and the columns of a row."""
