"""Evaluation of dense and patched models."""

from .perplexity import Perplexity, generation_perplexity, perplexity

__all__ = ["Perplexity", "generation_perplexity", "perplexity"]
