"""pbrd: policy based routing that fails over and heals by itself."""

__version__ = "0.1.0"
