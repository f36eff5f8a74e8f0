"""From stored images to batches of views on the training device."""
