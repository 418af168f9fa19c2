"""Tensor operations of the paged engine: tensors in, tensors out.

Knows nothing of requests, pages as objects, or configuration.
"""
