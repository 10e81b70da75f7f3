"""Vocabulary: a model and its tokenizer -> both without the tokens that nobody uses."""
