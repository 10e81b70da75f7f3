"""GGUF files for llama.cpp, at the sizes of the shrunk model."""
