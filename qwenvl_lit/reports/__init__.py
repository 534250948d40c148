"""What people read: data and scores as pages and in the terminal, and the card of an exported model."""
