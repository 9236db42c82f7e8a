"""Making what a training reads from a cache: latents of images, and embeddings of captions."""
