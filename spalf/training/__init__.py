"""One training loop for both phases; a phase is data."""
