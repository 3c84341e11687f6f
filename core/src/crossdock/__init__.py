"""crossdock: a task queue for Python that runs on the broker you already have."""
