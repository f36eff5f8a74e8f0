"""What several methods are made of, or one whose file would be too long with it: state, losses, hand-crafted features."""
