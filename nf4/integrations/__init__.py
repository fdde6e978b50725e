"""Plug-ins for other packages; each is imported only when a user asks for it."""
