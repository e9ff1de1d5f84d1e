"""What speaks to frameworks."""
