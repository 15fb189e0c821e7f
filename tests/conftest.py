"""pytest configuration."""
