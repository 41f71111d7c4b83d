"""Tokenizers from the files of models, batches of texts, and chats by templates."""

from nyscaled.models.tokenizers.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
