"""GGUF, llama.cpp's file format: one file with a model's configuration, tokenizer, chat template and weights."""
