"""Models: the only place that knows transformers' and TransformerLens's internals."""
