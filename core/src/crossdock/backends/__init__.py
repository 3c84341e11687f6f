"""The two embedded backends: memory and SQLite. They register as plugins, like everybody else's."""
