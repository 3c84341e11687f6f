"""A crossdock backend on plain files: a message is a file, its state is the directory that the file is in.

Read `record` (what a file's name says), `queue` (one queue on the disk, and how it heals), `store` (the verbs), `broker` (how they
reach an event loop). `disk` has the few ways in which files are changed, `location` says which folders are ours.
"""
