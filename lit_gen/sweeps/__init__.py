"""Searching for good values of a configuration: Optuna suggests, fresh processes train."""
