"""The demo: a real language model quantized, measured, fine-tuned, saved, reloaded and merged."""
