"""Model families: what turns conversations into tensors and tensors back into text and boxes."""
