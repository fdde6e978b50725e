"""Whole models: find layers, quantize them, put adapters on, merge, start."""
