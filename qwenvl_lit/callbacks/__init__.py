"""Lightning callbacks: what a run writes, draws and prints, and how it is saved and resumed."""
