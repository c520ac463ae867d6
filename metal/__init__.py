"""Metal kernel bodies, one a file, read through ``importlib.resources``; see README.md here."""
