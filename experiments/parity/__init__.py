"""Our quantization and our exports against the libraries that do the same."""
