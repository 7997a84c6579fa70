"""From a configuration to an experiment."""
