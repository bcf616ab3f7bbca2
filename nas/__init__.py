"""Find the best sparse Transformer under a budget: configuration, data, costs, search, export, report, commands."""

__version__ = "0.1.0"
