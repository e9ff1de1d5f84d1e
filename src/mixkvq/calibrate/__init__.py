"""Finding a configuration for a model."""
