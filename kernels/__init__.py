"""The operations that decide the speed, each one exact in PyTorch, tiled for CPUs and fused in Triton for GPUs."""

from kernels.bregman import bregman_loss
from kernels.contrastive import contrastive_loss
from kernels.crop import crop_resize
from kernels.distance import distance_correlation
from kernels.kmeans import kmeans_assign
from kernels.nearest import nearest
from kernels.ntxent import ntxent
from kernels.photometric import PhotometricParams, photometric
from kernels.simplex import simplex_loss
from kernels.support import SupportSet

__all__ = [
    "PhotometricParams",
    "SupportSet",
    "bregman_loss",
    "contrastive_loss",
    "crop_resize",
    "distance_correlation",
    "kmeans_assign",
    "nearest",
    "ntxent",
    "photometric",
    "simplex_loss",
]
