"""What torch.library sees: operators, how they are registered, checked, chosen and called."""
