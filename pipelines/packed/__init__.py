"""Sets packed into few large files: FFCV's .beton, tar shards (WebDataset), TFRecord shards; written and read back.

What worker processes run imports no torch: encode, worker, checking, and the formats. They start in a third of a second.
"""
