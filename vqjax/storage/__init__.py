"""Our own files: codecs, decoders, refiners, indexes."""
