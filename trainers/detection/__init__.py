"""Object detection from a pretrained encoder: stored boxes, torchvision's Faster R-CNN around the encoder, training."""
