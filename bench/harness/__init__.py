"""What every benchmark shares: cases, peers, the clock, results in files, pages made of them."""
