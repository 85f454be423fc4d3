"""Texts as token ids: tokenizers, corpora, batches."""
