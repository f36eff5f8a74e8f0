"""What methods are made of where one file would be too long, or two the same: state, losses, hand-crafted features."""
