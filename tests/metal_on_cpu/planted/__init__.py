"""Bugs to plant in our kernels: a title, a text found once there, and what stands in its place."""
