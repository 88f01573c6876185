"""Caches of quantized weights and hidden states that plans share, and the handling of out-of-memory errors."""
