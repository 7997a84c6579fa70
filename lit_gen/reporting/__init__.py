"""Runs, sweeps, and policy searches as the sections of one HTML page (`lit-gen report`)."""
