"""What a server does when something breaks: one fault after another, under load.

scenarios ──► trial ──► stand   process 1 of the container, restarted when it exits
                │         ▲
                ├─► load ─┘     callers that know the right answer to every request
                └─► watching    readiness, memory, /dev/shm
report: the outcomes of the requests, how long recovery took, whether readiness was accurate
"""
