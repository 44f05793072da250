"""Small models of many architectures, each loaded by its own library and streamed, compared bit for bit.

In: an architecture's name. Out: equal, refused (and by what), or different, on one page.
"""
