"""The parts of `benchmarks/cifar_speedrun.py`. On a GPU they need torch, torchvision, triton and numpy."""
