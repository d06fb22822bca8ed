"""The log: the only inlet (D1). One protocol, two logs (D2), and the codec of what they carry."""
