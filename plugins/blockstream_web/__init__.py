"""A page for runs: `blockstream web` shows it in a browser.

    blockstream web                 # the packaged configs, runs in out/web, http://127.0.0.1:8321/
    blockstream web my.yaml         # these configs alone

The server holds no model. What computes are the commands, each a process of its own: `blockstream run` for a
run, `blockstream plan` and `blockstream compare` for a question. So stopping is an interrupt, going on is
`--resume`, and what a run needs is gone when it ends.
"""
