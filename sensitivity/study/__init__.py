"""The door between the wings: trials on disk as typed records, and the queue."""
