"""`nf4 compare`: one model fine-tuned by each method, at equal steps on the same text."""
