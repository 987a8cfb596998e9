"""Generation: images from a trained model, and the generator that is released."""
