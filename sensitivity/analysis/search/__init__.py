"""Search: which plans a sweep tries, listed beforehand or chosen one after the other."""
