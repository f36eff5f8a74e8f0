"""The operations that decide the speed, each one exact in PyTorch and, where it pays, fused."""

from kernels.contrastive import contrastive_loss
from kernels.crop import crop_resize
from kernels.nearest import nearest
from kernels.ntxent import ntxent
from kernels.photometric import PhotometricParams, photometric

__all__ = ["PhotometricParams", "contrastive_loss", "crop_resize", "nearest", "ntxent", "photometric"]
