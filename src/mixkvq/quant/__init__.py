"""Pure tensor mathematics: no cache, no model."""
