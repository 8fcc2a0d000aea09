"""Training of the embedded models: codec, text encoder, decoders; evidence that they learned."""
