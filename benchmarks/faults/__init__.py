"""What a server does when something breaks: one fault after the other, under load.

scenarios ──► trial ──► stand   process 1 of the container, started again when it ends
                │         ▲
                ├─► load ─┘     callers that know the right answer of every request
                └─► watching    readiness, memory, /dev/shm
report: what became of the requests, how long it took, whether readiness told the truth
"""
