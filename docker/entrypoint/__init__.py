"""What the image does beyond tritonserver: start it guarded, probe it truly, drain it.

    python3 -m docker.entrypoint serve /models      process 1 of the container
    python3 -m docker.entrypoint probe live         exit status 0 or 1 and a sentence
    python3 -m docker.entrypoint drain              before it is stopped

The standard library and `server` only: a probe runs every few seconds, and the image carries
nothing that serving does not need.
"""
