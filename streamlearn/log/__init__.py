"""The log is the only input (D1): one interface with two implementations (D2), and the codec of its records."""
