"""Every method and preset at 1 to 4 bits on every part of the embedded models: which wins at equal stored bits?"""
