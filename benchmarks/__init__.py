"""Claims about speed, each measured side by side with what it is compared to."""
