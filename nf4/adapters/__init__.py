"""What an adapter is, on a layer and as a term beside its product."""
