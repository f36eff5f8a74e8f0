"""The Triton kernels, one file an operation. Nothing here is imported before a kernel is to run or be compiled."""
