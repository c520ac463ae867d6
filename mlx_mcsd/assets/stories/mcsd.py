from mlx_mcsd.model import Model, ModelArgs  # noqa: F401
