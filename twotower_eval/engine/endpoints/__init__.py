"""Models behind an OpenAI-compatible server: requests to it, and the model, decoder and scorer made of them."""
