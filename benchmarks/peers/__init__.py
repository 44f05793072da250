"""Race blockstream against what users would run today: every peer in an environment of its own.

`models` are the networks, `ways` the contestants, `contestant` runs one of them in a process of its
own, `environments` makes the places they are installed in, `cells` is the grid and what of it is done,
`page` the table and the figure. `python -m benchmarks.peers` runs them all.
"""
