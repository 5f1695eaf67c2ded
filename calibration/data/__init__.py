"""What goes through a model: texts, token ids, batches, and how processes share them."""
