"""A small world to train on without any download: paintings of a mood, and annotators who say what they feel."""
