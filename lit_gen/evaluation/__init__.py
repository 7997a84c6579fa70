"""What a model, or any set of images, is worth: samples, likelihoods, translations."""
