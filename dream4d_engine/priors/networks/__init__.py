"""The frozen networks as the method sees them, and what makes them fast."""
