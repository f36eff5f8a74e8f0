"""Sets packed into few large files: FFCV's .beton, tar shards (WebDataset), TFRecord shards; written and read back.

Nothing here imports torch but `opening`: the processes of a conversion start in a fraction of a second.
"""
