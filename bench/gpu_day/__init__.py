"""A GPU day in one command: scripts that need a checkout, and nothing installed."""
