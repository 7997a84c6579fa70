"""Trained models as folders that others load: with lit_gen, with diffusers, or with torch alone."""
