"""JPEG decoding in C: a region once, cut into all the crops of an image."""
