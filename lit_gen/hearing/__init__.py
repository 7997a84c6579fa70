"""Phonemic restoration (Warren 1970, https://doi.org/10.1126/science.167.3917.392) by a score model of words.

trials.py (words with a piece cut out, and what fills it), listeners.py (what a listener believes of what it
hears), judges.py (what was restored), study.py (the arms, cell by
cell), examples.py (what is seen and heard of it).
"""
