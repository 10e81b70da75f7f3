"""GGUF: files of llama.cpp at the sizes that are left."""
