"""PyTorch reference of MCSD for Hugging Face transformers; shares no code with the MLX side."""
