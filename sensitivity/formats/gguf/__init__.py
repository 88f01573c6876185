"""GGUF: writes language model and vision projector with our own codes as llama.cpp's blocks, and runs them there."""
