"""Training of the embedded models: corpus, codec, text encoder, decoders, evidence."""
