"""Whole models: training steps and decoding of a Llama, and SmolLM2, ours and others'."""
