"""From raw text to batches of token ids: tokenizers, token shards, sample order, preparation."""
