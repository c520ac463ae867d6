"""Conversion of MCSD checkpoints in the Hugging Face layout to MLX."""
