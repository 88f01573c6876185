"""GGUF: writes language model and vision tower with our own codes as llama.cpp's blocks, and runs them there."""
