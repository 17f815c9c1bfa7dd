"""Text to packed token batches: tokenizer, Arrow shards, chats, loader."""
