"""The method: the attention in transformers, the router, the loss, the teacher's signals."""
