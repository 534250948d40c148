"""How `test` measures: which sets, by whose protocol, with which answers."""
