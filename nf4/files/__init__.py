"""Folders and files: adapters, dense weights, models quantized a weight at a time."""
