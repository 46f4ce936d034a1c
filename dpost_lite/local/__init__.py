"""The exported model: writing a GGUF file, and solving problems with it."""
