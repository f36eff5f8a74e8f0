"""Sets packed into few large files: FFCV's .beton, tar shards (WebDataset), TFRecord shards; written and read back.

What worker processes run (encode, worker, checking, the formats) imports no torch: they start in a third of a second.
"""
