"""Object detection: a small detector, trained by Lightning or as the child of a policy search."""
