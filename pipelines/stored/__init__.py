"""Data sets as they lie on disk: what an image is, and one reader a set."""
