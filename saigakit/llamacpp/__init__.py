"""Write, quantise and read GGUF files as llama.cpp does, and compute importance matrices."""
