"""What knows nothing of the format: bars, figures, paths, samples, sizes, scratch, installing."""
