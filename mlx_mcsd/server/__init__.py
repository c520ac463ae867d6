"""The server behind ``python -m mlx_mcsd.serve``: OpenAI's interface, sessions and a chat page.

mlx-lm's ``BatchGenerator`` does the batching; its own server is not built on, because it fetches
addresses and loads models that requests name, matches stop strings by tokens and serves seeded
requests one at a time.
"""
