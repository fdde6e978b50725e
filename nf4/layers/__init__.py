"""Modules that hold a 4-bit weight, and dense ones with adapters."""
