"""The operations that decide the speed, each one exact in PyTorch and, where it pays, fused."""
